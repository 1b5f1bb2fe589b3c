#include "api/cli/npy.h"

#include <algorithm>
#include <cstring>

#include "cache/file.h"
#include "tests/fuzz/fuzz.h"

/// NumPy's files, which `kiln run` takes tensors from.
namespace kiln::fuzz {
namespace {

constexpr Dtype kDtypes[] = {Dtype::s8, Dtype::u8, Dtype::s32, Dtype::f32, Dtype::bf16, Dtype::f16};
constexpr const char* kWritten = "written.npy";

bool accepts(ByteSpan input) {
  static MemoryFile file;
  const std::string& path = file.with(input);
  Result<cli::NpyArray> array = cli::read_npy(path);
  if (!array) {
    expect_refusal(array.status(), Code::invalid_argument);
    expect(array.status().message().starts_with(path + ":"), "a message begins with the path");
    return false;
  }
  const auto dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                  [&](Dtype candidate) { return cli::npy_descr(candidate) == array->descr; });
  expect(dtype != std::end(kDtypes), "the dtype is a known one");
  const Result<std::uint64_t> bytes = cli::bytes_of(array->shape, size_of(*dtype));
  expect(bytes && *bytes == array->buffer.size() && *bytes <= input.size(), "the data are those of the shape");
  const ByteSpan data = input.last(array->buffer.size());
  expect(std::equal(data.begin(), data.end(), array->buffer.data()), "the data end the file");

  const cli::Tensor tensor{*dtype, array->shape, std::move(array->buffer)};
  expect(cli::write_npy(kWritten, tensor).is_ok(), "an array can be written");
  const Result<cli::NpyArray> again = cli::read_npy(kWritten);
  expect(again && again->descr == array->descr && again->shape == tensor.shape &&
             std::equal(data.begin(), data.end(), again->buffer.data()),
         "what was written is read again");
  return true;
}

/// A whole file. `version` has a second byte 0.
std::string npy(char version, std::string header, std::string_view data) {
  header.append(63 - (12 + header.size()) % 64, ' ');
  header += '\n';
  std::string start = "\x93NUMPY";
  start += {version, '\0', static_cast<char>(header.size() & 0xff), static_cast<char>(header.size() >> 8)};
  if (version > 1)
    start += {'\0', '\0'};
  return start + header + std::string(data);
}

std::vector<Seed> seeds() {
  return {accepted(npy(1, "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 1), }", "12345678")),
          accepted(npy(2, "{'shape':(3,),'fortran_order':False,'descr':\"=i1\"}", "abc")),
          accepted(npy(3, "{'descr': '<f2', 'fortran_order': False, 'shape': (), }", "xy")),
          accepted(npy(1, "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 9223372036854775807), }", "")),
          refused(npy(1, "{'descr': '<i4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }", "")),
          refused(npy(1, "{'descr': '<f4', 'fortran_order': True, 'shape': (1,), }", "abcd")),
          refused(npy(1, "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,), }", "abcd"))};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
