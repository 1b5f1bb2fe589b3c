#include "api/kiln_int4pack.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include <fmt/format.h>

#include "api/c_boundary.h"
#include "api/c_structs.h"

/// aten::_weight_int4pack_mm in terms of kiln.h.

namespace kiln {
namespace {

/// What a pack was made from.
struct WeightKey {
  const void* w;
  const void* sz;
  std::int64_t n, k, group;
  std::int32_t tiles, device_index;
  auto operator<=>(const WeightKey&) const = default;
};

struct ReleasePack {
  void operator()(kiln_pack* pack) const { kiln_pack_release(pack); }
};
using PackHandle = std::unique_ptr<kiln_pack, ReleasePack>;

} // namespace
} // namespace kiln

struct kiln_int4pack_weights {
  std::mutex mutex;
  std::map<kiln::WeightKey, kiln::PackHandle> packs;
};

namespace kiln {
namespace {

constexpr std::string_view kOp = "_weight_int4pack_mm";

Status bad(std::string_view argument, std::string_view given, std::string_view allowed) {
  return Status::error(Code::invalid_argument,
                       fmt::format("{}: {} is {}: allowed is {}", kOp, argument, given, allowed));
}

std::string shape_text(const kiln_tensor& tensor) {
  std::string text;
  for (std::int32_t i = 0; i < tensor.rank; ++i)
    text += fmt::format("{}{}", i > 0 ? ", " : "", tensor.sizes[i]);
  return fmt::format("[{}]", text);
}

constexpr std::int32_t kMostRank = 64;

Status check_tensor(std::string_view name, const kiln_tensor* given, kiln_tensor& copy, std::int32_t dtype,
                    std::string_view dtype_text, std::int32_t rank) {
  if (given == nullptr)
    return bad(name, "null", "a tensor");
  const kiln_tensor* read = nullptr;
  if (Status s = read_sized(name, given, given->size, sizeof(kiln_tensor), copy, read); !s)
    return s;
  copy = *read;
  if (copy.device != KILN_DEVICE_CUDA)
    return bad(fmt::format("{}'s device", name), copy.device == KILN_DEVICE_CPU ? "cpu" : std::to_string(copy.device),
               "a GPU (KILN_DEVICE_CUDA)");
  if (copy.dtype != dtype)
    return bad(fmt::format("{}'s dtype", name), std::to_string(copy.dtype), dtype_text);
  if (copy.rank != rank || copy.rank > kMostRank)
    return bad(fmt::format("{}'s rank", name), std::to_string(copy.rank), std::to_string(rank));
  if (copy.sizes == nullptr || copy.strides == nullptr)
    return bad(fmt::format("{}'s sizes or strides", name), "null", fmt::format("{} of each", rank));
  std::int64_t stride = 1;
  for (std::int32_t i = rank; i-- > 0;) {
    if (copy.sizes[i] < 0 || copy.sizes[i] > INT32_MAX)
      return bad(fmt::format("{}'s size {}", name, i), std::to_string(copy.sizes[i]), "0 to 2^31 - 1");
    if (copy.sizes[i] > 1 && copy.strides[i] != stride)
      return bad(fmt::format("{}'s stride {}", name, i), std::to_string(copy.strides[i]),
                 fmt::format("{}: a contiguous tensor", stride));
    if (__builtin_mul_overflow(stride, std::max<std::int64_t>(copy.sizes[i], 1), &stride))
      return bad(fmt::format("{}'s shape", name), shape_text(copy), "less than 2^63 elements");
  }
  return {};
}

struct Problem {
  kiln_tensor self, mat2, sz;
  std::int64_t m, n, k, group;
  std::int32_t tiles;
};

Status check_problem(const kiln_tensor* self, const kiln_tensor* mat2, std::int64_t group, const kiln_tensor* sz,
                     Problem& p) {
  if (Status s = check_tensor("self", self, p.self, KILN_BF16, "KILN_BF16 (4)", 2); !s)
    return s;
  if (Status s = check_tensor("mat2", mat2, p.mat2, KILN_S32, "KILN_S32 (2)", 4); !s)
    return s;
  if (Status s = check_tensor("qScaleAndZeros", sz, p.sz, KILN_BF16, "KILN_BF16 (4)", 3); !s)
    return s;
  for (const auto& [name, tensor] : {std::pair{"mat2", &p.mat2}, {"qScaleAndZeros", &p.sz}})
    if (tensor->device_index != p.self.device_index)
      return bad(fmt::format("{}'s device", name), fmt::format("cuda:{}", tensor->device_index),
                 fmt::format("cuda:{}, that of self", p.self.device_index));
  const std::int64_t* const shape = p.mat2.sizes;
  p.tiles = static_cast<std::int32_t>(2 * shape[3]);
  if (shape[2] != 32 || (shape[3] != 1 && shape[3] != 2 && shape[3] != 4))
    return bad("mat2's shape", shape_text(p.mat2), "[N/8, K/(T*16), 32, T/2] with T 2, 4 or 8");
  p.m = p.self.sizes[0];
  p.k = p.self.sizes[1];
  p.n = 8 * shape[0];
  p.group = group;
  if (group != 32 && group != 64 && group != 128 && group != 256)
    return bad("qGroupSize", std::to_string(group), "32, 64, 128 or 256");
  if (p.k % group != 0)
    return bad("qGroupSize", std::to_string(group), fmt::format("a divisor of K = {}", p.k));
  if (shape[1] * p.tiles * 16 != p.k)
    return bad("mat2's shape", shape_text(p.mat2), fmt::format("weights of K = {}, that of self", p.k));
  const std::int64_t* const scales = p.sz.sizes;
  if (scales[0] != p.k / group || scales[1] != p.n || scales[2] != 2)
    return bad("qScaleAndZeros' shape", shape_text(p.sz), fmt::format("[{}, {}, 2]", p.k / group, p.n));
  for (const auto& [name, tensor] : {std::pair{"self", &p.self}, {"mat2", &p.mat2}, {"qScaleAndZeros", &p.sz}})
    if (tensor->data == nullptr && p.m > 0 && p.n > 0 && p.k > 0)
      return bad(fmt::format("{}'s data", name), "null", "memory of the GPU");
  return {};
}

kiln_int4_mm_desc desc_of(const Problem& p) {
  kiln_int4_mm_desc desc = KILN_INT4_MM_DESC_INIT;
  desc.base.device = KILN_DEVICE_CUDA;
  desc.base.device_index = p.self.device_index;
  desc.m = p.m;
  desc.n = p.n;
  desc.k = p.k;
  desc.group = static_cast<std::int32_t>(p.group);
  desc.inner_k_tiles = p.tiles;
  return desc;
}

/// A status of kiln.h as one of ours, with its message; a launch that fails is Code::internal already.
Status passed_on(kiln_status status) {
  if (status == KILN_OK)
    return {};
  return Status::error(static_cast<Code>(status), fmt::format("{}: {}", kOp, kiln_last_error()));
}

/// The pack of these weights: of the model's, or for this call alone (then `own` holds it).
Status find_pack(const kiln_int4pack_call& call, const Problem& p, const kiln_pack*& out, PackHandle& own) {
  const kiln_int4_mm_desc desc = desc_of(p);
  kiln_int4_mm_weights weights = KILN_INT4_MM_WEIGHTS_INIT;
  weights.w = p.mat2.data;
  weights.sz = p.sz.data;
  weights.device = KILN_DEVICE_CUDA;
  weights.stream = call.stream;
  const auto make = [&](PackHandle& pack) {
    kiln_pack* made = nullptr;
    const Status status = passed_on(kiln_int4_mm_pack_create(call.engine, &desc, &weights, &made));
    pack.reset(made);
    return status;
  };
  if (call.weights == nullptr) {
    Status status = make(own);
    out = own.get();
    return status;
  }
  const WeightKey key = {p.mat2.data, p.sz.data, p.n, p.k, p.group, p.tiles, p.self.device_index};
  std::lock_guard lock(call.weights->mutex); // others wait for a pack that they may be waiting for
  if (const auto found = call.weights->packs.find(key); found != call.weights->packs.end()) {
    out = found->second.get();
    return {};
  }
  PackHandle made;
  if (Status status = make(made); !status)
    return status;
  out = call.weights->packs.emplace(key, std::move(made)).first->second.get();
  return {};
}

Status multiply(const kiln_int4pack_call& call, const Problem& p, void** output) {
  const kiln_int4_mm_desc desc = desc_of(p);
  kiln_kernel* found = nullptr;
  if (Status status = passed_on(kiln_get_for_stream(call.engine, &desc.base, call.stream, &found)); !status)
    return status;
  const std::unique_ptr<kiln_kernel, void (*)(kiln_kernel*)> kernel(found, kiln_kernel_release);
  const kiln_pack* pack = nullptr;
  PackHandle own;
  if (Status status = find_pack(call, p, pack, own); !status)
    return status;
  void* y = nullptr;
  void* const made = call.allocate(call.context, p.m, p.n, p.self.device_index, &y);
  if (made == nullptr)
    return Status::error(Code::out_of_memory, fmt::format("{}: no memory for an output [{}, {}]", kOp, p.m, p.n));
  kiln_int4_mm_args args = KILN_INT4_MM_ARGS_INIT;
  args.m = p.m;
  args.x = p.self.data;
  args.ldx = p.k;
  args.w_pack = pack;
  args.y = y;
  args.ldy = p.n;
  args.stream = call.stream;
  if (Status status = passed_on(kiln_run(kernel.get(), &args.base)); !status) {
    call.release(call.context, made);
    return status;
  }
  *output = made;
  return {};
}

} // namespace
} // namespace kiln

using namespace kiln;

extern "C" {

kiln_status kiln_int4pack_weights_create(kiln_int4pack_weights** weights) {
  return guarded([&]() -> Status {
    if (weights == nullptr)
      return bad("weights", "null", "where to put the handle");
    *weights = new kiln_int4pack_weights;
    return {};
  });
}

void kiln_int4pack_weights_destroy(kiln_int4pack_weights* weights) {
  delete weights;
}

kiln_status kiln_weight_int4pack_mm(const kiln_int4pack_call* call, const kiln_tensor* self, const kiln_tensor* mat2,
                                    int64_t q_group_size, const kiln_tensor* q_scale_and_zeros, void** output) {
  return guarded([&]() -> Status {
    if (output == nullptr)
      return bad("the output", "null", "where to put the tensor");
    *output = nullptr;
    if (call == nullptr)
      return bad("call", "null", "a kiln_int4pack_call");
    kiln_int4pack_call copy;
    const kiln_int4pack_call* read = nullptr;
    if (Status s = read_sized("kiln_int4pack_call", call, call->size, sizeof(kiln_int4pack_call), copy, read); !s)
      return s;
    if (read->engine == nullptr || read->allocate == nullptr || read->release == nullptr)
      return bad("call.engine, allocate or release", "null", "all three");
    Problem problem;
    if (Status s = check_problem(self, mat2, q_group_size, q_scale_and_zeros, problem); !s)
      return s;
    return multiply(*read, problem, output);
  });
}

} // extern "C"
