#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "api/c_ops.h"
#include "jit/ops/int8_mm_driver.h"

/// Packs of int8_mm behind the C API, which int8_linear shares.
namespace kiln {

/// For the desc of either op, whose m is ignored; `ldb` ≥ n (kn) or ≥ k (nk).
Result<std::unique_ptr<AnyPack>> make_int8_pack(Engine& engine, const KernelDesc& desc, const void* b, std::int64_t ldb,
                                                int8_mm::BLayout b_layout, std::int64_t n, std::int64_t k,
                                                int8_mm::BDtype b_dtype = int8_mm::BDtype::s8);
/// For the device of the desc; Code::invalid_argument when its kernels do not read the file's layout.
Result<std::unique_ptr<AnyPack>> load_int8_pack(Engine& engine, const KernelDesc& desc, const std::string& path,
                                                std::int64_t n, std::int64_t k,
                                                int8_mm::BDtype b_dtype = int8_mm::BDtype::s8);
/// The pack behind the handle, null for null; Code::invalid_argument for that of another op. `name`: of the argument.
Status read_int8_pack(const kiln_pack* handle, std::string_view name, const int8_mm::Pack*& out);

} // namespace kiln
