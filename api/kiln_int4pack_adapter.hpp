// The symbol aoti_torch_cuda__weight_int4pack_mm over any runtime's tensors, on kiln_int4pack.h. Header-only, C++17. In one source file:
//
//   struct Traits {
//     using Tensor = AtenTensorHandle;  // what the symbol takes; a pointer
//     using Error = AOTITorchError;     // what it returns
//     static bool is_null(Tensor);
//     static void* data(Tensor);                      // with the storage offset
//     static int32_t dtype(Tensor);                   // kiln_dtype, or −1 for one that kiln.h does not name
//     static bool on_cuda(Tensor);
//     static int32_t device_index(Tensor);
//     static int32_t rank(Tensor);
//     static int64_t size(Tensor, int32_t dimension);
//     static int64_t stride(Tensor, int32_t dimension);
//     static Tensor allocate_bf16(int64_t rows, int64_t columns, int32_t device_index);  // contiguous; null when it cannot
//     static void release(Tensor);
//     static void* current_stream(int32_t device_index);  // CUstream
//     static kiln_engine* engine();                    // one for the process
//     static kiln_int4pack_weights* weights();         // of the model; null: see kiln_int4pack.h
//     static Error success();
//     static Error failure(kiln_status status, const char* message);  // KILN_INVALID_ARGUMENT: of the caller; all else: internal
//   };
//   KILN_DEFINE_WEIGHT_INT4PACK_MM(Traits)
#ifndef KILN_INT4PACK_ADAPTER_HPP
#define KILN_INT4PACK_ADAPTER_HPP

#include <cstdint>

#include <kiln_int4pack.h>

namespace kiln_adapter {

/// One tensor of the runtime as a kiln_tensor, which points into it: not to be copied.
template <class Traits> class TensorView {
public:
  explicit TensorView(typename Traits::Tensor tensor) {
    if (Traits::is_null(tensor))
      return;
    is_there_ = true;
    view_.data = Traits::data(tensor);
    view_.dtype = Traits::dtype(tensor);
    view_.device = Traits::on_cuda(tensor) ? KILN_DEVICE_CUDA : KILN_DEVICE_CPU;
    view_.device_index = Traits::device_index(tensor);
    view_.rank = Traits::rank(tensor);
    for (std::int32_t i = 0; i < view_.rank && i < kMostRank; ++i) {
      sizes_[i] = Traits::size(tensor, i);
      strides_[i] = Traits::stride(tensor, i);
    }
    view_.sizes = sizes_;
    view_.strides = strides_;
  }
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;
  const kiln_tensor* get() const { return is_there_ ? &view_ : nullptr; }

private:
  static constexpr std::int32_t kMostRank = 8; // the operator's tensors have 2, 3 and 4: others are refused by rank
  kiln_tensor view_ = KILN_TENSOR_INIT;
  std::int64_t sizes_[kMostRank] = {}, strides_[kMostRank] = {};
  bool is_there_ = false;
};

template <class Traits>
typename Traits::Error weight_int4pack_mm(typename Traits::Tensor self, typename Traits::Tensor mat2,
                                          std::int64_t group_size, typename Traits::Tensor scales_and_zeros,
                                          typename Traits::Tensor* result) {
  using Tensor = typename Traits::Tensor;
  const TensorView<Traits> a(self), w(mat2), sz(scales_and_zeros);
  kiln_int4pack_call call = KILN_INT4PACK_CALL_INIT;
  call.engine = Traits::engine();
  call.weights = Traits::weights();
  call.stream = a.get() != nullptr && a.get()->device == KILN_DEVICE_CUDA
                    ? Traits::current_stream(a.get()->device_index)
                    : nullptr;
  call.allocate = [](void*, std::int64_t rows, std::int64_t columns, std::int32_t device, void** data) -> void* {
    const Tensor made = Traits::allocate_bf16(rows, columns, device);
    if (Traits::is_null(made))
      return nullptr;
    *data = Traits::data(made);
    return static_cast<void*>(made);
  };
  call.release = [](void*, void* output) { Traits::release(static_cast<Tensor>(output)); };
  void* output = nullptr;
  const kiln_status status = kiln_weight_int4pack_mm(&call, a.get(), w.get(), group_size, sz.get(),
                                                     result != nullptr ? &output : nullptr);
  if (result != nullptr)
    *result = static_cast<Tensor>(output);
  return status == KILN_OK ? Traits::success() : Traits::failure(status, kiln_last_error());
}

} // namespace kiln_adapter

#define KILN_DEFINE_WEIGHT_INT4PACK_MM(Traits)                                                                         \
  extern "C" __attribute__((visibility("default"))) Traits::Error aoti_torch_cuda__weight_int4pack_mm(        \
      Traits::Tensor self, Traits::Tensor mat2, std::int64_t qGroupSize, Traits::Tensor qScaleAndZeros,                \
      Traits::Tensor* ret0) {                                                                                          \
    return kiln_adapter::weight_int4pack_mm<Traits>(self, mat2, qGroupSize, qScaleAndZeros, ret0);                     \
  }

#endif
