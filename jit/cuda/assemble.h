#pragma once
#include <string>
#include <string_view>

#include "cache/status.h"
#include "jit/code_object.h"
#include "jit/cuda/driver.h"

/// PTX to cubin.
namespace kiln::cuda {

struct Assembled {
  CodeObject cubin;
  std::string log; ///< what the assembler said: registers, spills, warnings; may be empty
};

/// By the driver's linker (cuLinkCreate, cuLinkAddData, cuLinkComplete), for the device's SM. Code::compile_failed has
/// the CUDA name and the log.
Result<Assembled> assemble_with_driver(Driver& driver, int device_index, const CodeObject& ptx);

/// By the program `ptxas`, for the SM of the code object: needs no driver and no GPU. Code::compile_failed with its
/// output; Code::unsupported when it cannot be run.
Result<Assembled> assemble_with_ptxas(const std::string& ptxas, const CodeObject& ptx);
/// The first `ptxas` of `path` (as PATH), else that of /usr/local/cuda/bin; empty when there is none.
std::string find_ptxas(std::string_view path);

/// Lines of an assembler's log that tell of lost speed: advisories C7500 to C7599 (ignored setmaxnreg, serialised
/// wgmma).
std::string performance_warnings(std::string_view log);

} // namespace kiln::cuda
