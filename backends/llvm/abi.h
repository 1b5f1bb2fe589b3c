#pragma once
#include <cstddef>
#include <cstdint>

/// The one call between libkiln and the shared object that holds LLVM. Both sides have a C++ runtime of their own, so
/// only bytes cross.
namespace kiln::llvm_abi {

/// Raised with every change of what is declared here or of how requests are laid out.
inline constexpr std::uint32_t kVersion = 1;

/// A request (Writer's form): u32 kVersion, string generator id, u8 RequestKind, then
/// - compile: string desc text, string target text (only the features that the code may use); the answer is a
/// serialised CodeObject;
/// - disassemble: string architecture, blob image, u32 count, then count × (string entry name, u64 offset); the answer
/// is the listing.
enum class RequestKind : std::uint8_t { compile = 1, disassemble = 2 };

/// Called exactly once, on the calling thread, before the entry point returns. `code` is a kiln::Code; `data` is the
/// answer when it is ok and a message otherwise, and is valid only during the call.
using Answer = void (*)(void* context, std::uint32_t code, const std::uint8_t* data, std::size_t size);

/// Any thread, any number at once. Throws nothing, keeps nothing of the request, aborts on nothing that LLVM reports.
using EntryPoint = void (*)(const std::uint8_t* request, std::size_t size, Answer answer, void* context);
inline constexpr char kEntryPoint[] = "kiln_llvm_answer";

} // namespace kiln::llvm_abi
