#include "backends/llvm/shared_object.h"

#include <dlfcn.h>

#include <string>

#include <fmt/format.h>

#include "cache/fork_gate.h"

#include <llvm_generator_id.h>

namespace kiln::portable {
namespace {

/// Of the library or program that this code was linked into; empty when the loader cannot tell.
std::string own_directory() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&own_directory), &info) == 0 || info.dli_fname == nullptr)
    return {};
  const std::string path = info.dli_fname;
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? std::string() : path.substr(0, slash);
}

/// Beside libkiln, in an installation's or build tree's lib, then wherever the dynamic loader looks. dlopen counts
/// references and finds an open object again, so that nothing needs to be remembered between calls.
Result<llvm_abi::EntryPoint> open_generator() {
  const std::string name = KILN_LLVM_FILE;
  std::vector<std::string> candidates;
  if (const std::string directory = own_directory(); !directory.empty())
    candidates = {directory + "/" + name, directory + "/../lib/" + name};
  candidates.push_back(name);

  std::string failures;
  for (const std::string& candidate : candidates) {
    void* handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == nullptr) {
      const char* why = dlerror();
      failures += fmt::format("\n  {}: {}", candidate, why ? why : "cannot be opened");
      continue;
    }
    if (void* entry = dlsym(handle, llvm_abi::kEntryPoint))
      return reinterpret_cast<llvm_abi::EntryPoint>(entry);
    failures += fmt::format("\n  {}: has no function {}", candidate, llvm_abi::kEntryPoint);
  }
  return Status::error(
      Code::unsupported,
      fmt::format("{}, which compiles with LLVM, cannot be opened; looked for it here:{}", name, failures));
}

struct Received {
  Code code = Code::internal;
  Bytes data;
};

void receive(void* context, std::uint32_t code, const std::uint8_t* data, std::size_t size) {
  auto& received = *static_cast<Received*>(context);
  received.code = code <= static_cast<std::uint32_t>(Code::internal) ? static_cast<Code>(code) : Code::internal;
  received.data.assign(data, data + size);
}

} // namespace

Writer begin_request(llvm_abi::RequestKind kind) {
  Writer request;
  request.u32(llvm_abi::kVersion);
  request.string(k_llvm_generator_digest);
  request.u8(static_cast<std::uint8_t>(kind));
  return request;
}

Result<Bytes> ask_llvm(const Writer& request) {
  if (was_forked_inside(ForkRegion::generator))
    return Status::error(Code::unsupported, "this process was forked while another thread compiled with LLVM, whose "
                                            "locks may be held for good here: it cannot compile with LLVM");
  // LLVM, and the loader while it opens it.
  const InForkRegion region(ForkRegion::generator);
  const Result<llvm_abi::EntryPoint> entry = open_generator();
  if (!entry)
    return entry.status();
  Received received;
  (*entry)(request.bytes().data(), request.bytes().size(), receive, &received);
  if (received.code != Code::ok)
    return Status::error(received.code, std::string(received.data.begin(), received.data.end()));
  return std::move(received.data);
}

Status supports_arch(const KernelDesc&, const Target& target) {
  if (target.arch == Arch::x86_64 || target.arch == Arch::aarch64)
    return {};
  return Status::error(Code::unsupported,
                       fmt::format("portable generates x86_64 and aarch64 code, not {}", name_of(target.arch)));
}

Result<CodeObject> compile_with_llvm(const KernelDesc& desc, const Target& used) {
  Writer request = begin_request(llvm_abi::RequestKind::compile);
  request.string(desc.text());
  request.string(used.text());
  const Result<Bytes> code = ask_llvm(request);
  if (!code)
    return code.status();
  return CodeObject::parse(*code);
}

} // namespace kiln::portable
