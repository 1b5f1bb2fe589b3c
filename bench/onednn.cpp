#include "bench/onednn.h"

#include <omp.h>

#include <unordered_map>

#include <oneapi/dnnl/dnnl.hpp>

namespace kiln::bench {

using dnnl::memory;

struct OneDnn::Impl {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::primitive primitive;
  std::string implementation;
  std::vector<HugeBuffer> storage;
  std::vector<std::unordered_map<int, memory>> arguments; ///< one a copy
  int threads;

  explicit Impl(int thread_count) : threads(thread_count) {
    omp_set_num_threads(threads); // oneDNN divides the work when it makes the primitive
  }

  template <class Descriptor>
  void make(const Descriptor& descriptor, const memory& a, memory b, const memory& c, int copies) {
    primitive = dnnl::primitive(descriptor);
    implementation = descriptor.impl_info_str();
    for (int copy = 0; copy < copies; ++copy) {
      storage.emplace_back(descriptor.weights_desc().get_size());
      memory weights(descriptor.weights_desc(), engine, storage.back().as<void>());
      dnnl::reorder(b, weights).execute(stream, b, weights);
      arguments.push_back({{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, c}});
    }
    stream.wait();
  }
};

OneDnn::OneDnn(Primitive primitive, std::int64_t m, std::int64_t n, std::int64_t k, const std::int8_t* a,
               const std::int8_t* b, void* c, int threads, int copies, const OneDnnEpilogue* epilogue)
    : impl_(std::make_unique<Impl>(threads)) {
  const dnnl::engine& engine = impl_->engine;
  const auto s8 = memory::data_type::s8, s32 = memory::data_type::s32;
  const memory::desc a_desc({m, k}, s8, memory::format_tag::ab),
      c_desc({m, n}, epilogue != nullptr ? s8 : s32, memory::format_tag::ab);
  dnnl::primitive_attr attributes;
  if (epilogue != nullptr) {
    constexpr int each_column = 1 << 1, one = 0;
    attributes.set_output_scales(each_column, epilogue->scale);
    if (primitive == Primitive::matmul) {
      attributes.set_zero_points(DNNL_ARG_SRC, one, {epilogue->a_zp});
      attributes.set_zero_points(DNNL_ARG_DST, one, {epilogue->c_zp});
    }
  }
  const memory a_memory(a_desc, engine, const_cast<std::int8_t*>(a)), c_memory(c_desc, engine, c);
  if (primitive == Primitive::matmul) {
    const memory b_memory({{k, n}, s8, memory::format_tag::ba}, engine, const_cast<std::int8_t*>(b));
    impl_->make(
        dnnl::matmul::primitive_desc({a_desc, {{k, n}, s8, memory::format_tag::any}, c_desc}, attributes, engine),
        a_memory, b_memory, c_memory, copies);
  } else {
    const memory b_memory({{n, k}, s8, memory::format_tag::ab}, engine, const_cast<std::int8_t*>(b));
    impl_->make(dnnl::inner_product_forward::primitive_desc(
                    {dnnl::prop_kind::forward_inference, a_desc, {{n, k}, s8, memory::format_tag::any}, c_desc},
                    attributes, engine),
                a_memory, b_memory, c_memory, copies);
  }
}

OneDnn::OneDnn(std::int64_t m, std::int64_t n, std::int64_t k, const std::uint16_t* x, const std::uint16_t* w,
               std::uint16_t* y, int threads, int copies)
    : impl_(std::make_unique<Impl>(threads)) {
  const dnnl::engine& engine = impl_->engine;
  constexpr auto bf16 = memory::data_type::bf16;
  const memory::desc x_desc({m, k}, bf16, memory::format_tag::ab), y_desc({m, n}, bf16, memory::format_tag::ab);
  impl_->make(
      dnnl::inner_product_forward::primitive_desc(
          {dnnl::prop_kind::forward_inference, x_desc, {{n, k}, bf16, memory::format_tag::any}, y_desc}, engine),
      memory(x_desc, engine, const_cast<std::uint16_t*>(x)),
      memory({{n, k}, bf16, memory::format_tag::ab}, engine, const_cast<std::uint16_t*>(w)), memory(y_desc, engine, y),
      copies);
}

OneDnn::~OneDnn() = default;

void OneDnn::run(int copy) {
  omp_set_num_threads(impl_->threads);
  impl_->primitive.execute(impl_->stream, impl_->arguments[static_cast<std::size_t>(copy)]);
  impl_->stream.wait();
}

const std::string& OneDnn::implementation() const {
  return impl_->implementation;
}

} // namespace kiln::bench
