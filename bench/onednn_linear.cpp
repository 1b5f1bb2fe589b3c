#include "bench/onednn_linear.h"

#include <omp.h>

#include <unordered_map>
#include <vector>

#include <oneapi/dnnl/dnnl.hpp>

#include "bench/machine.h"

namespace kiln::bench {

using dnnl::memory;

struct OneDnnLinear::Impl {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::inner_product_forward primitive;
  std::string implementation;
  std::vector<HugeBuffer> storage;
  std::vector<std::unordered_map<int, memory>> arguments; ///< one a copy
  int threads = 1;
};

OneDnnLinear::OneDnnLinear(std::int64_t m, std::int64_t n, std::int64_t k, const std::uint16_t* x,
                           const std::uint16_t* w, std::uint16_t* y, int threads, int copies)
    : impl_(std::make_unique<Impl>()) {
  impl_->threads = threads;
  omp_set_num_threads(threads); // oneDNN divides the work when it makes the primitive
  const dnnl::engine& engine = impl_->engine;
  constexpr auto bf16 = memory::data_type::bf16;
  const memory::desc x_desc({m, k}, bf16, memory::format_tag::ab), y_desc({m, n}, bf16, memory::format_tag::ab);
  const dnnl::inner_product_forward::primitive_desc descriptor(
      {dnnl::prop_kind::forward_inference, x_desc, {{n, k}, bf16, memory::format_tag::any}, y_desc}, engine);
  impl_->primitive = dnnl::inner_product_forward(descriptor);
  impl_->implementation = descriptor.impl_info_str();
  memory plain({{n, k}, bf16, memory::format_tag::ab}, engine, const_cast<std::uint16_t*>(w));
  for (int copy = 0; copy < copies; ++copy) {
    impl_->storage.emplace_back(descriptor.weights_desc().get_size());
    memory weights(descriptor.weights_desc(), engine, impl_->storage.back().as<void>());
    dnnl::reorder(plain, weights).execute(impl_->stream, plain, weights);
    impl_->arguments.push_back({{DNNL_ARG_SRC, memory(x_desc, engine, const_cast<std::uint16_t*>(x))},
                                {DNNL_ARG_WEIGHTS, weights},
                                {DNNL_ARG_DST, memory(y_desc, engine, y)}});
  }
  impl_->stream.wait();
}

OneDnnLinear::~OneDnnLinear() = default;

void OneDnnLinear::run(int copy) {
  omp_set_num_threads(impl_->threads);
  impl_->primitive.execute(impl_->stream, impl_->arguments[static_cast<std::size_t>(copy)]);
  impl_->stream.wait();
}

const std::string& OneDnnLinear::implementation() const {
  return impl_->implementation;
}

} // namespace kiln::bench
