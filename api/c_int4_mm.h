#pragma once
#include "api/c_ops.h"

namespace kiln {

COp c_int4_mm();

/// What kiln_int4_mm_pack_create does; `desc` is the checked one.
Result<std::unique_ptr<AnyPack>> make_int4_mm_pack(Engine& engine, const KernelDesc& desc,
                                                   const kiln_int4_mm_weights* weights);
/// What kiln_int4_to_tensor_core and kiln_int4_from_tensor_core do.
Status convert_int4_weights(bool to_tensor_core, const void* from, std::int64_t n, std::int64_t k,
                            std::int32_t inner_k_tiles, void* to);

} // namespace kiln
