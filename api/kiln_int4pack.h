/* aten::_weight_int4pack_mm for runtimes of compiled PyTorch models, on Kiln's int4_mm: what such a runtime's symbol
 * aoti_torch_cuda__weight_int4pack_mm computes, checks and allocates, in terms of plain pointers, sizes and strides. It is C11 and C++. The
 * symbol itself, over a runtime's own tensors: kiln_int4pack_adapter.hpp.
 *
 * The general rules of kiln.h hold. */
#ifndef KILN_INT4PACK_H
#define KILN_INT4PACK_H

#include <kiln.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One tensor. Sizes and strides in elements. */
typedef struct kiln_tensor {
  size_t size; /* of this struct */
  void* data;
  int32_t dtype;  /* kiln_dtype; any other value for types that kiln.h does not name */
  int32_t device; /* kiln_device */
  int32_t device_index;
  int32_t rank;
  const int64_t* sizes;   /* [rank] */
  const int64_t* strides; /* [rank] */
} kiln_tensor;
#define KILN_TENSOR_INIT {sizeof(kiln_tensor), 0, 0, 0, 0, 0, 0, 0}

/* Makes the output: a contiguous bf16 tensor [rows][columns] on GPU device_index. Gives its data and returns a handle of the runtime's own, or
 * NULL when it cannot. Called at most once a call, before anything is on the stream. */
typedef void* (*kiln_allocate_output)(void* context, int64_t rows, int64_t columns, int32_t device_index, void** data);
/* Takes back an output when the call fails after all. */
typedef void (*kiln_release_output)(void* context, void* output);

/* The packed weights of one model: which of its weight tensors have been packed, by their addresses and shapes. As long as it lives, the weights
 * that were given with it must neither change nor be freed: that is the promise that packing once rests on. Any thread. */
typedef struct kiln_int4pack_weights kiln_int4pack_weights;
KILN_API kiln_status kiln_int4pack_weights_create(kiln_int4pack_weights** weights);
/* Waits for the GPU, and frees the packs. */
KILN_API void kiln_int4pack_weights_destroy(kiln_int4pack_weights* weights);

typedef struct kiln_int4pack_call {
  size_t size;
  kiln_engine* engine;
  kiln_int4pack_weights* weights; /* NULL: the weights are packed for this call alone, which is slow, and waits for the GPU */
  void* stream; /* CUstream */
  kiln_allocate_output allocate;
  kiln_release_output release;
  void* context; /* of both */
} kiln_int4pack_call;
#define KILN_INT4PACK_CALL_INIT {sizeof(kiln_int4pack_call), 0, 0, 0, 0, 0, 0}

/* *output[M][N] = self[M][K] · dequantised mat2, on the stream when it returns.
 * self: bf16 [M][K]; mat2: int32 [N/8][K/(T·16)][32][T/2] with T 2, 4 or 8; q_group_size: 32, 64, 128 or 256, a divisor of K;
 * q_scale_and_zeros: bf16 [K/q_group_size][N][2]. All contiguous, on one GPU.
 * A weight that is not packed yet is packed now: under stream capture that is KILN_BUSY.
 * KILN_INVALID_ARGUMENT names the tensor and what is wrong with its dtype, rank, size, stride, device or address, a null output, the group;
 * KILN_INTERNAL: the launch failed; KILN_OUT_OF_MEMORY: also when `allocate` gave NULL. After an error *output is NULL. */
KILN_API kiln_status kiln_weight_int4pack_mm(const kiln_int4pack_call* call, const kiln_tensor* self, const kiln_tensor* mat2, int64_t q_group_size,
                                             const kiln_tensor* q_scale_and_zeros, void** output);

#ifdef __cplusplus
}
#endif
#endif
