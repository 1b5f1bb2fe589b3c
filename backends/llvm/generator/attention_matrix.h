#pragma once
#include "backends/llvm/generator/attention_emitter.h"
#include "jit/ops/attention.h"
#include "jit/target.h"

namespace kiln::generator {

/// The tile shapes of attention by a matrix unit: written once, for the code and for its launch plan.
///
/// A register of scores holds `lanes_per_row` keys of each of `row_lanes` rows. A step of rows is what the unit
/// multiplies together; the rows of a block share one rearrangement of each tile of K and V.
struct MatrixBlocking : RowState {
  int step_rows;           ///< rows of a step, a multiple of row_lanes
  int step_keys;           ///< keys of a step, a multiple of two registers' keys
  int value_step;          ///< values of a row of V, a multiple of lanes_per_row, to which Dv is padded
  std::int64_t block_rows; ///< a multiple of step_rows
  /// Between the chunks of scores, P and O. A load whose address equals that of a store before it in the last 12 bits
  /// waits for that store: chunks a power of two apart would make each step of the exponentials wait for the one
  /// before.
  std::int64_t chunk_gap = 0;
  std::int64_t tile;         ///< keys that are rearranged together, a multiple of score_keys
  std::int64_t score_keys;   ///< keys between two updates of the state, a multiple of step_keys
  std::int64_t q_step_bytes; ///< workspace for the rows of Q of one step,
  std::int64_t k_bytes;      ///< for a tile of K,
  std::int64_t v_parts;      ///< for one of V, which lies in parts, each some values of all keys,
  std::int64_t v_step_bytes; ///< of so much for each step of keys,
  std::int64_t unit_bytes;   ///< and for what else the unit needs

  // What follows from those.
  std::int64_t d = 0, dv = 0;
  bool rows_differ = false;                                                       ///< in the keys that they see
  std::int64_t unit_state = 0, scores = 0, q = 0, o = 0, k = 0, v = 0, bytes = 0; ///< byte offsets in the workspace,
                                                                                  ///< and its size

  /// Fills in the second half.
  void lay_out(const KernelDesc& desc);
  attention::Plan plan() const;

  int step_vectors() const { return step_rows / row_lanes; }
  /// Registers of one step: of scores of lanes_per_row keys, of O of as many values. Two of the first are one of P.
  std::int64_t chunk_bytes() const { return step_vectors() * register_bytes() + chunk_gap; }
  std::int64_t score_bytes() const { return score_keys / lanes_per_row() * chunk_bytes(); }
  std::int64_t value_chunks() const { return (dv + value_step - 1) / value_step * value_step / lanes_per_row(); }
  std::int64_t v_part_bytes() const { return tile / step_keys * v_step_bytes; }
  std::int64_t o_step_bytes() const { return value_chunks() * chunk_bytes(); }
};

/// Writes the kernel for many rows:
///
///   for each block of rows:               Q rearranged, once
///     for each tile of keys that any row of the block sees:
///       K and V rearranged
///       for each step of rows:
///         for each score_keys of the keys that any row of the step sees:
///           S = Q · Kᵀ                    the unit
///           masks where some row does not see all; maxima; P = exp2(scale · S − max), in place of S; sums
///           O = O · factor + P · V        the unit
///     O / sum
///
/// Layouts in the workspace, for a step: scores [keys / lanes_per_row][step_vectors][row_lanes][lanes_per_row] f32, P
/// [keys / (2 · lanes_per_row)][step_vectors][row_lanes][2 · lanes_per_row] bf16, O [value_chunks][step_vectors]
/// [row_lanes][lanes_per_row] f32. Those of Q, K and V are the unit's own.
///
/// P is 0 for a key that its row does not see, and 0 · V would be a NaN where V is none of the finite. So rearranged
/// tiles hold zeros for keys that no row of the block sees, and where rows differ in what they see, infinities and NaNs
/// of V are taken out of the tile and added to the rows that see them one by one.
class MatrixAttention : protected AttentionEmitter {
public:
  virtual ~MatrixAttention() = default;
  void emit();

protected:
  MatrixAttention(llvm::Function* function, const MatrixBlocking& blocking)
      : AttentionEmitter(function, blocking), b_(blocking) {}

  // ---- the unit
  /// Before all else and after it.
  virtual void enter() {}
  virtual void leave() {}
  /// `rows` rows of the block, a multiple of step_rows, from load_row_address() to the workspace.
  virtual void rearrange_q(llvm::Value* rows) = 0;
  /// `keys` keys of a tile at `k` and at `v`, padded to a multiple of step_keys: with anything for K, with zeros for V.
  virtual void rearrange_k(llvm::Value* k, llvm::Value* keys) = 0;
  virtual void rearrange_v(llvm::Value* v, llvm::Value* keys) = 0;
  /// A step of rows against some keys of a tile.
  struct Step {
    llvm::Value *first, *rows;  ///< the first, in the block, and how many
    llvm::Value* first_row;     ///< in the call
    llvm::Value* begin;         ///< the first key, in the tile: a multiple of score_keys
    llvm::Value *keys, *padded; ///< that any row sees, up to score_keys; rounded up to step_keys
  };
  virtual void score(const Step& step) = 0;
  /// Adds to O of the step.
  virtual void accumulate(const Step& step) = 0;
  /// Two registers of P, of consecutive keys, as one of bf16: P's layout.
  virtual llvm::Value* narrow(llvm::Value* first, llvm::Value* second) = 0;

  // ---- for the unit
  /// Fetches the line at `at` into the caches.
  void prefetch(llvm::Value* at) {
    ir_.CreateIntrinsic(llvm::Intrinsic::prefetch, {ir_.getPtrTy()},
                        {at, ir_.getInt32(0), ir_.getInt32(3), ir_.getInt32(1)});
  }
  llvm::Value* q_of_step(llvm::Value* first) {
    return advance(ir_, at(b_.q), times(divided(first, b_.step_rows), b_.q_step_bytes));
  }
  llvm::Value* o_of_step(llvm::Value* first) {
    return advance(ir_, at(b_.o), times(divided(first, b_.step_rows), b_.o_step_bytes()));
  }

  const MatrixBlocking& b_;

private:
  /// Keys that the block goes through together.
  struct Tile {
    llvm::Value *row, *rows;    ///< the block's
    llvm::Value *key, *keys;    ///< the first, and how many
    llvm::Value* v;             ///< address of the first one's values
    llvm::Value* has_taken_out; ///< whether some of V was no finite number; null where that cannot matter
  };

  /// body(vector, byte offset of the vector's state) for each register of `rows` rows from `first` on.
  void for_vectors(llvm::Value* first, llvm::Value* rows,
                   llvm::function_ref<void(llvm::Value* vector, llvm::Value* state)> body);

  /// Byte offset of a row's register in an array of [rows / row_lanes][lanes].
  llvm::Value* state_of(llvm::Value* row) { return times(divided(row, b_.row_lanes), b_.register_bytes()); }
  void clear_state(llvm::Value* rows);
  void take_steps(const Tile& tile);
  void soften(const Tile& tile, const Step& step);
  void mask_step(llvm::Value* scores, llvm::Value* limits, llvm::Value* key, llvm::Value* seen_by_all,
                 llvm::Value* padded);
  llvm::Value* greatest(llvm::Value* scores, llvm::Value* padded);
  llvm::Value* exponentiate(llvm::Value* scores, llvm::Value* padded, const Exponent& exponent);
  void rescale(llvm::Value* o, llvm::Value* factor);

  llvm::Value* is_finite(llvm::Value* bits);
  llvm::Value* take_out_non_finite(llvm::Value* keys);
  void add_non_finite(const Tile& tile, const Step& step);

  void finish(llvm::Value* first_row, llvm::Value* rows);
  llvm::Value* gather(llvm::Value* from, llvm::Value* value, std::int64_t count);
  void store_row(llvm::Value* from, llvm::Value* to, llvm::Value* factor);
};

// ---------------------------------------------------------------- the units

/// AMX's tdpbf16ps. Serves any number of rows.
MatrixBlocking amx_blocking(const KernelDesc& desc, const Target& target);
void emit_amx_attention(llvm::Function* function, const KernelDesc& desc, const Target& target);

/// Arm's BFMMLA. Serves any number of rows.
MatrixBlocking bfmmla_blocking(const KernelDesc& desc, const Target& target);
void emit_bfmmla_attention(llvm::Function* function, const KernelDesc& desc, const Target& target);

} // namespace kiln::generator
