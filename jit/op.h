#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cache/status.h"
#include "jit/desc.h"

namespace kiln {

class Kernel;
struct Runtime;

/// A problem of a desc's size in the memory of its device, to time kernels with. Any content that takes usual time.
class TimingProblem {
public:
  virtual ~TimingProblem() = default;
  /// Puts one call on the stream (a CUstream).
  virtual Status run(const Kernel& kernel, void* stream) = 0;
};

/// One field of an op's desc, as named in OPS.md: the C API, the command, manifests and keys all use this table.
struct FieldSpec {
  std::string_view name;
  std::int64_t min = 0, max = 0; ///< of an integer field
  std::int64_t default_value = 0;
  bool required = false;
  std::span<const std::string_view> choices{}; ///< a named field when not empty: the value is an index into it
  bool any_allowed = false;                    ///< kAny (`any`) is a value
  std::int64_t small = 256; ///< of a required one in a desc whose reference takes no time, for checks of a machine
};

enum class Dtype : std::uint8_t { s8, u8, s32, f32, bf16, f16, e4m3, e5m2 };
std::string_view name_of(Dtype dtype);
std::size_t size_of(Dtype dtype);

/// One tensor of an op, for whoever makes or checks tensors without knowing the op (the command, tests).
struct TensorSpec {
  std::string_view name;
  bool output = false;
  Dtype (*dtype)(const KernelDesc&);
  /// Row-major extents for this desc.
  std::vector<std::int64_t> (*shape)(const KernelDesc&);
  /// Whether the desc has this tensor at all; null: always.
  bool (*present)(const KernelDesc&) = nullptr;
  bool optional = false; ///< each call has it or not, whatever the desc

  bool is_present(const KernelDesc& desc) const { return present == nullptr || present(desc); }
};

/// A range of m that one kernel serves; max is the op's largest m for the unbounded class.
struct MRange {
  std::int64_t min = 0, max = 0;
};

/// One op family: everything about it that is neither machine nor ISA. One row of op_table(); jit/ops/NAME.h has its
/// typed view.
struct OpSpec {
  OpId id;
  std::string_view name;
  std::span<const FieldSpec> fields;
  std::span<const TensorSpec> tensors;
  /// What the table's ranges cannot say. The message names field, value and what is allowed.
  Status (*check)(const KernelDesc&);
  /// The desc whose kernel serves this one: sizes that code takes at run time replaced by their class, fields that
  /// change no code by their default. Idempotent; cheap (on the path of every get).
  KernelDesc (*canonical)(const KernelDesc&);
  /// The m that a kernel of this canonical desc serves.
  MRange (*m_range)(const KernelDesc&);
  /// A code object's launch plan in the op's own type (int8_mm::Plan); Code::integrity when it is not one.
  Result<std::shared_ptr<const void>> (*bind_plan)(std::span<const std::pair<std::string, std::int64_t>>);
  /// Layout id of the packed weights that a kernel with this plan reads; null for an op without packs.
  std::string (*pack_layout)(const void* plan);
  /// The desc that decides how weights are packed: the same weights, any m. Null likewise.
  KernelDesc (*pack_desc)(const KernelDesc&);
  /// Multiply and add each count one.
  double (*operations)(const KernelDesc&);
  /// Compulsory traffic: each input and output once.
  double (*bytes)(const KernelDesc&);
  /// Null for an op whose kernels cannot be tuned. An m of kAny is taken as some large one.
  Result<std::unique_ptr<TimingProblem>> (*timing_problem)(const KernelDesc&, Runtime&) = nullptr;
};

std::span<const OpSpec> op_table();
const OpSpec* find_op(OpId id);
const OpSpec* find_op(std::string_view name);
/// Field index in the op's table, or -1.
int find_field(const OpSpec& op, std::string_view name);

/// The value of one field from its text; Code::invalid_argument lists what is allowed.
Result<std::int64_t> parse_field(const OpSpec& op, const FieldSpec& field, std::string_view text);
/// Builds a desc from `key=value` pairs: unknown field, bad value, missing or repeated field are errors that list what
/// is allowed; `device` is accepted for every op. The result is checked but not canonical.
Result<KernelDesc> desc_from_fields(std::string_view op, std::span<const std::pair<std::string, std::string>> fields);
/// Of what KernelDesc::text() gives, or any `op key=value …` line.
Result<KernelDesc> parse_desc(std::string_view text);
/// Ranges, then the op's own check.
Status check_desc(const KernelDesc& desc);
/// Of descs that share a kernel the one with the largest m, or with none.
std::vector<KernelDesc> one_for_each_kernel(std::span<const KernelDesc> descs);
std::string known_op_names(); ///< comma list

} // namespace kiln
