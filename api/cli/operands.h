#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cache/status.h"
#include "jit/desc.h"
#include "jit/op.h"
#include "jit/target.h"

namespace kiln::cli {

using NamedTexts = std::vector<std::pair<std::string, std::string>>;

/// `OP key=value … tensor=@file.npy …`, taken apart.
struct Operands {
  const OpSpec* op = nullptr;
  NamedTexts fields; ///< desc fields as given
  NamedTexts files;  ///< tensor name (of the op's table; `out` is its first output) and path
  NamedTexts values; ///< optional tensor and what fills it: a number, or `random`

  bool gives(std::string_view tensor) const; ///< in either way
};

/// Code::invalid_argument names the word and what is allowed.
Result<Operands> parse_operands(std::span<const std::string> words);

/// For commands that take no tensors.
Result<KernelDesc> desc_from_words(std::span<const std::string> words);

/// A small problem of the op: every size that must be given is 256, all else its default. With much less, the path
/// that most calls take may leave it to another (sme does), or a group of weights may not fit.
Result<KernelDesc> small_desc(const OpSpec& op);

/// The machine that an option names: nothing when the option was not given (this machine).
Result<std::optional<Target>> parse_target(const std::optional<std::string>& text);

/// A target that is a GPU makes a desc without a device one for cuda: no CPU's code would run there.
void take_device_of(const std::optional<Target>& target, KernelDesc& desc);

/// The shape of the file given for a tensor, or null when none is.
using GivenShape = std::function<const std::vector<std::int64_t>*(std::string_view tensor)>;
/// The desc, with sizes that were left out taken from the shapes of the given tensors. Every size is a number,
/// and every given shape is the one that the desc asks for.
Result<KernelDesc> desc_from_shapes(const Operands& operands, const GivenShape& given_shape);

} // namespace kiln::cli
