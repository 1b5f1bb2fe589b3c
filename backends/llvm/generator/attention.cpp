#include "backends/llvm/generator/attention.h"

#include <algorithm>
#include <cfloat>
#include <cstddef>

#include <llvm/IR/Module.h>

#include "backends/llvm/generator/attention_matrix.h"
#include "backends/llvm/generator/attention_unit.h"
#include "backends/llvm/generator/ir.h"

namespace kiln::generator {
namespace {

using attention::Call;
using llvm::Value;

constexpr std::int64_t kCacheLine = 64;
/// How far before their use few rows have K fetched; V is fetched when the same keys are multiplied with Q.
constexpr std::int64_t kKeysAhead = 32;

constexpr std::int64_t round_up(std::int64_t v, std::int64_t step) {
  return (v + step - 1) / step * step;
}

/// The tile shapes and everything that follows from them: written once, for the code and for its launch plan.
///
/// Scores lie with rows along the lanes of a register. A kernel for many rows gives each row one lane, so that a dword
/// of a key, broadcast, multiplies `lanes` rows of Q: K is read as it lies, and maxima and sums need nothing across
/// lanes. With few rows, `lanes_per_row` lanes hold that many pieces of one row's sum, and as many of a key are
/// broadcast.
struct Blocking {
  DotUnit unit;
  std::int64_t group, d, dv;
  bool few;                ///< rows: K and V are read once, as they lie
  bool fetches_ahead;      ///< few rows, yet so many that memory's own prefetching falls behind (measured on Zen 4)
  int lanes_per_row;       ///< 1 for many rows
  int row_lanes;           ///< rows in a register
  int vectors;             ///< registers of rows in a block
  int rows;                ///< of a block: vectors · row_lanes
  int keys;                ///< of one step of Q·K, a multiple of lanes_per_row and of unit.width
  int value_rows;          ///< rows in one step of P·V
  int value_vectors;       ///< registers of values in a chunk of P·V
  std::int64_t tile;       ///< keys between two updates of the state, a multiple of `keys`
  std::int64_t q_dwords;   ///< of a row of Q, padded to lanes_per_row
  std::int64_t dv_vectors; ///< registers of a row of V, the last one padded
  // Workspace: byte offsets.
  std::int64_t q_rows, o_rows;        ///< s64 [rows]: byte offset of each row of Q and O
  std::int64_t limits;                ///< s32 [vectors][lanes]: keys below it are visible to the lane's row
  std::int64_t maxima, sums, factors; ///< f32 [vectors][lanes]: the softmax's state, and what O is multiplied by
  std::int64_t squares;               ///< many rows: two of [lanes][lanes], for transposing
  std::int64_t q;                     ///< [q_dwords / lanes_per_row][vectors][lanes]
  std::int64_t scores, scores_vector; ///< f32 [vectors][tile / lanes_per_row][lanes], then P in its place
  std::int64_t o;                     ///< f32 [rows][dv_vectors][lanes]
  std::int64_t k_tile;                ///< many rows without bf16 instructions: f32 [tile][d]
  std::int64_t v_tile;                ///< many rows: chunks of value_vectors, each [tile / width][value_vectors][lanes]
  std::int64_t bytes;

  bool widens_k() const { return !few && unit.width == 1; }
  std::int64_t o_row_bytes() const { return dv_vectors * unit.lanes * 4; }
  std::int64_t p_step() const { return std::max(lanes_per_row / unit.width, 1); } ///< dwords of P in one register's row
};

Blocking blocking_of(const KernelDesc& desc, const Target& target) {
  Blocking b{};
  b.unit = DotUnit::of(target);
  b.group = attention::group_of(desc);
  b.d = desc.value[attention::kD];
  b.dv = desc.value[attention::kDv];
  const std::int64_t m = desc.value[attention::kM];
  const int lanes = b.unit.lanes;
  b.few = m != kAny;
  const int few_rows = b.few ? static_cast<int>(m * b.group) : 0;
  b.fetches_ahead = few_rows > 2;
  b.row_lanes = b.few ? std::min(few_rows <= 2 ? few_rows : 4, lanes) : lanes;
  b.lanes_per_row = lanes / b.row_lanes;
  b.vectors = b.few ? (few_rows + b.row_lanes - 1) / b.row_lanes : b.unit.row_vectors;
  b.rows = b.vectors * b.row_lanes;
  b.dv_vectors = (b.dv + lanes - 1) / lanes;
  if (b.few) {
    // Sums enough to hide the latency of the instruction, in the registers that there are.
    const int most_sums = b.unit.row_vectors * b.unit.keys;
    const int steps = std::max(most_sums / (b.vectors * b.lanes_per_row * 2), 1);
    b.keys = static_cast<int>(round_up(b.lanes_per_row * steps, b.unit.width));
    b.value_rows = few_rows;
    b.value_vectors = std::clamp(b.unit.rows * b.unit.value_vectors / few_rows, 1, 8);
  } else {
    b.keys = b.unit.keys;
    b.value_rows = b.unit.rows;
    b.value_vectors = b.unit.value_vectors;
  }
  b.value_vectors = static_cast<int>(std::min<std::int64_t>(b.value_vectors, b.dv_vectors));
  // What a tile needs (scores, and of K and V what is rearranged) stays in the smallest L2 in use, 512 KiB.
  b.tile = round_up(b.few || b.widens_k() ? 64 : 128, b.keys);
  b.q_dwords = round_up(b.d / b.unit.width, b.lanes_per_row);

  std::int64_t end = 0;
  const auto take = [&](std::int64_t bytes) {
    const std::int64_t begin = end;
    end += round_up(bytes, kCacheLine);
    return begin;
  };
  const std::int64_t state = b.vectors * lanes * 4;
  b.q_rows = take(b.rows * 8);
  b.o_rows = take(b.rows * 8);
  b.limits = take(state);
  b.maxima = take(state);
  b.sums = take(state);
  b.factors = take(state);
  b.squares = take(2 * lanes * lanes * 4);
  b.q = take(b.q_dwords * b.rows * 4);
  b.scores_vector = b.tile * b.row_lanes * 4;
  b.scores = take(b.vectors * b.scores_vector);
  b.o = take(round_up(b.rows, b.value_rows) * b.o_row_bytes());
  b.k_tile = take(b.widens_k() ? b.tile * b.d * 4 : 0);
  b.v_tile = take(b.few ? 0 : b.tile / b.unit.width * b.dv_vectors * lanes * 4);
  b.bytes = end;
  return b;
}

/// Writes the kernel:
///
///   for each block of rows:              Q transposed, once
///     for each tile of keys that any row of the block sees:
///       V (and K for fma) rearranged     many rows only
///       S = K · Qᵀ                       rows along lanes
///       masks where some row does not see all; maxima; P = exp2(scale · S − max), in place of S; sums
///       O = O · factor + P · V
///     O / sum
class Attention {
public:
  Attention(llvm::Function* function, const KernelDesc& desc, const Target& target)
      : ir_(function->getContext()), call_(function->getArg(0)), b_(blocking_of(desc, target)), unit_(b_.unit) {
    ir_.SetInsertPoint(llvm::BasicBlock::Create(ir_.getContext(), "entry", function));
  }

  void emit() {
    workspace_ = pointer(offsetof(Call, workspace));
    key_begin_ = integer(offsetof(Call, key_begin));
    key_end_ = integer(offsetof(Call, key_end));
    row_begin_ = integer(offsetof(Call, row_begin));
    row_end_ = integer(offsetof(Call, row_end));
    visible_ = integer(offsetof(Call, visible));
    visible_step_ = integer(offsetof(Call, visible_step));
    k_stride_ = ir_.CreateShl(integer(offsetof(Call, k_row_stride)), 1);
    v_stride_ = ir_.CreateShl(integer(offsetof(Call, v_row_stride)), 1);
    Value* scale =
        ir_.CreateAlignedLoad(ir_.getFloatTy(), advance(ir_, call_, offsetof(Call, scale_log2e)), llvm::Align(4));
    scale_ = ir_.CreateVectorSplat(static_cast<unsigned>(unit_.lanes), scale);
    Value* k = pointer(offsetof(Call, k));
    Value* v = pointer(offsetof(Call, v));

    Values none;
    loop(ir_, row_begin_, row_end_, b_.rows, none, [&](Value* row, Values&) {
      Value* rows = smaller(ir_.CreateSub(row_end_, row), ir_.getInt64(b_.rows));
      Value* last = ir_.CreateSub(ir_.CreateAdd(row, rows), ir_.getInt64(1));
      set_up_rows(row, last);
      transpose_q();
      clear_state();
      // Later queries see no less than earlier ones.
      Value* seen_by_all = limit_of(row);
      Value* seen_by_any = limit_of(last);
      Value* row_vectors =
          ir_.CreateUDiv(ir_.CreateAdd(rows, ir_.getInt64(b_.row_lanes - 1)), ir_.getInt64(b_.row_lanes));
      loop(ir_, key_begin_, seen_by_any, b_.tile, none, [&](Value* key, Values&) {
        Value* keys = smaller(ir_.CreateSub(seen_by_any, key), ir_.getInt64(b_.tile));
        Value* padded = round_up_to(keys, b_.keys);
        Value* k_of_tile = advance(ir_, k, ir_.CreateMul(key, k_stride_));
        Value* v_of_tile = advance(ir_, v, ir_.CreateMul(key, v_stride_));
        if (b_.widens_k())
          widen_k(k_of_tile, keys);
        if (!b_.few)
          rearrange_v(v_of_tile, keys, padded);
        score(k_of_tile, v_of_tile, keys, row_vectors);
        soften(key, padded, row_vectors, ir_.CreateICmpSGT(ir_.CreateAdd(key, padded), seen_by_all));
        accumulate(v_of_tile, keys, padded, rows);
      });
      finish(row, rows, row_vectors);
    });
    ir_.CreateRetVoid();
  }

private:
  Value* pointer(std::size_t offset) {
    return ir_.CreateLoad(ir_.getPtrTy(), advance(ir_, call_, static_cast<std::int64_t>(offset)));
  }
  Value* integer(std::size_t offset) {
    return ir_.CreateLoad(ir_.getInt64Ty(), advance(ir_, call_, static_cast<std::int64_t>(offset)));
  }
  Value* smaller(Value* a, Value* b) { return ir_.CreateSelect(ir_.CreateICmpSLT(a, b), a, b); }
  Value* larger(Value* a, Value* b) { return ir_.CreateSelect(ir_.CreateICmpSGT(a, b), a, b); }
  Value* round_up_to(Value* v, std::int64_t step) {
    return ir_.CreateMul(ir_.CreateUDiv(ir_.CreateAdd(v, ir_.getInt64(step - 1)), ir_.getInt64(step)),
                         ir_.getInt64(step));
  }
  Value* at(std::int64_t offset) { return advance(ir_, workspace_, offset); }
  Value* times(Value* v, std::int64_t by) { return ir_.CreateMul(v, ir_.getInt64(by)); }
  llvm::FixedVectorType* vector_of(llvm::Type* element, std::int64_t count) {
    return llvm::FixedVectorType::get(element, static_cast<unsigned>(count));
  }
  Value* load(llvm::Type* type, Value* from, int alignment) {
    return ir_.CreateAlignedLoad(type, from, llvm::Align(static_cast<unsigned>(alignment)));
  }
  Value* load_floats(Value* from) { return load(unit_.floats(ir_), from, unit_.lanes * 4); }
  void store_vector(Value* value, Value* to) {
    ir_.CreateAlignedStore(value, to, llvm::Align(static_cast<unsigned>(unit_.lanes * 4)));
  }
  Value* float_constant(double v) { return llvm::ConstantFP::get(unit_.floats(ir_), v); }
  std::int64_t register_bytes() const { return unit_.lanes * 4; }
  /// Runs body(vector) for each register of rows in use; the byte offset of its state.
  void for_row_vectors(Value* row_vectors, llvm::function_ref<void(Value* vector)> body) {
    if (b_.vectors == 1)
      return body(ir_.getInt64(0));
    Values none;
    loop(ir_, ir_.getInt64(0), row_vectors, 1, none, [&](Value* vector, Values&) { body(vector); });
  }

  // ---------------------------------------------------------------- rows

  Value* query_of(Value* row) { return ir_.CreateUDiv(row, ir_.getInt64(b_.group)); }

  /// The key from which on a row sees nothing, within the call's range.
  Value* limit_of(Value* row) {
    Value* limit = ir_.CreateAdd(visible_, ir_.CreateMul(query_of(row), visible_step_));
    return larger(smaller(limit, key_end_), key_begin_);
  }

  /// Offsets and limits of the block's rows. Rows that do not exist repeat the last one.
  void set_up_rows(Value* first, Value* last) {
    Value* q_head = ir_.CreateShl(integer(offsetof(Call, q_head_stride)), 1);
    Value* q_row = ir_.CreateShl(integer(offsetof(Call, q_row_stride)), 1);
    Value* o_head = ir_.CreateShl(integer(offsetof(Call, o_head_stride)), 1);
    Value* o_row = ir_.CreateShl(integer(offsetof(Call, o_row_stride)), 1);
    Values none;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.rows), 1, none, [&](Value* i, Values&) {
      Value* row = smaller(ir_.CreateAdd(first, i), last);
      Value* query = query_of(row);
      Value* head = ir_.CreateSub(row, times(query, b_.group));
      const auto offset = [&](Value* head_stride, Value* row_stride) {
        return ir_.CreateAdd(ir_.CreateMul(head, head_stride), ir_.CreateMul(query, row_stride));
      };
      ir_.CreateStore(offset(q_head, q_row), advance(ir_, at(b_.q_rows), times(i, 8)));
      ir_.CreateStore(offset(o_head, o_row), advance(ir_, at(b_.o_rows), times(i, 8)));
      Value* limit = ir_.CreateVectorSplat(static_cast<unsigned>(b_.lanes_per_row),
                                           ir_.CreateTrunc(limit_of(row), ir_.getInt32Ty()));
      ir_.CreateAlignedStore(limit, advance(ir_, at(b_.limits), times(i, b_.lanes_per_row * 4)), llvm::Align(4));
    });
  }

  /// `count` dwords of a row of Q or K: pairs of bf16, or f32.
  Value* load_dwords(Value* row, Value* dword, std::int64_t count) {
    Value* from = advance(ir_, row, times(dword, 2 * unit_.width));
    if (unit_.width == 2)
      return load(vector_of(ir_.getInt32Ty(), count), from, 2);
    return ir_.CreateBitCast(widen(ir_, load(vector_of(ir_.getInt16Ty(), count), from, 2)),
                             vector_of(ir_.getInt32Ty(), count));
  }

  /// The last dwords of a row, fewer than lanes_per_row, followed by zeros.
  Value* load_last_dwords(Value* row, std::int64_t first, std::int64_t count, std::int64_t total) {
    Value* out = llvm::Constant::getNullValue(vector_of(ir_.getInt32Ty(), total));
    for (std::int64_t done = 0; done < count;) {
      std::int64_t piece = 1;
      while (piece * 2 <= count - done)
        piece *= 2;
      Value* loaded = load_dwords(row, ir_.getInt64(first + done), piece);
      llvm::SmallVector<int, 16> widened, merged;
      for (int i = 0; i < total; ++i) {
        widened.push_back(i < piece ? i : 0);
        const bool here = i >= done && i < done + piece;
        merged.push_back(here ? static_cast<int>(total + i - done) : i);
      }
      out = ir_.CreateShuffleVector(out, ir_.CreateShuffleVector(loaded, widened), merged);
      done += piece;
    }
    return out;
  }

  Value* q_row(Value* row) {
    Value* offset = ir_.CreateLoad(ir_.getInt64Ty(), advance(ir_, at(b_.q_rows), times(row, 8)));
    return advance(ir_, pointer(offsetof(Call, q)), offset);
  }

  /// Q as the workspace has it.
  void transpose_q() {
    const std::int64_t lanes = unit_.lanes, per_row = b_.lanes_per_row, dwords = b_.d / unit_.width;
    Values none;
    if (per_row > 1) { // a register's worth of each row stays together
      loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.rows), 1, none, [&](Value* row, Values&) {
        Value* from = q_row(row);
        Value* to = advance(ir_, at(b_.q), times(row, per_row * 4)); // rows of all registers follow one another
        const std::int64_t whole = dwords / per_row;
        loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), 1, none, [&](Value* chunk, Values&) {
          ir_.CreateAlignedStore(load_dwords(from, times(chunk, per_row), per_row),
                                 advance(ir_, to, times(chunk, b_.rows * per_row * 4)), llvm::Align(4));
        });
        if (const std::int64_t rest = dwords % per_row)
          ir_.CreateAlignedStore(load_last_dwords(from, whole * per_row, rest, per_row),
                                 advance(ir_, to, whole * b_.rows * per_row * 4), llvm::Align(4));
      });
      return;
    }
    // Squares of `lanes` rows and dwords; the rows' ends in squares of fewer dwords.
    loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.vectors), 1, none, [&](Value* vector, Values&) {
      Value* first = times(vector, lanes);
      Value* to = advance(ir_, at(b_.q), times(vector, register_bytes()));
      const std::int64_t whole = dwords / lanes * lanes;
      loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), lanes, none, [&](Value* dword, Values&) {
        transpose_square(lanes, advance(ir_, to, times(dword, b_.rows * 4)),
                         [&](Value* row) { return load_dwords(q_row(ir_.CreateAdd(first, row)), dword, lanes); });
      });
      if (const std::int64_t rest = dwords % lanes)
        transpose_square(rest, advance(ir_, to, whole * b_.rows * 4), [&](Value* row) {
          return load_last_dwords(q_row(ir_.CreateAdd(first, row)), whole, rest, lanes);
        });
    });
  }

  /// The first `count` columns of a square whose rows load_row() gives: log2(lanes) rounds of interleaving the first
  /// half of the registers with the second. As loops over memory: unrolled, their shuffles would take most of a
  /// compile.
  void transpose_square(std::int64_t count, Value* to, llvm::function_ref<Value*(Value* row)> load_row) {
    const int lanes = unit_.lanes;
    llvm::SmallVector<int, 16> low, high;
    for (int i = 0; i < lanes / 2; ++i) {
      low.append({i, lanes + i});
      high.append({lanes / 2 + i, lanes + lanes / 2 + i});
    }
    Values none;
    std::int64_t from = 0, into = b_.squares;
    for (int round = 1; round < lanes; round *= 2) {
      const bool is_first = round == 1, is_last = 2 * round == lanes;
      loop(ir_, ir_.getInt64(0), ir_.getInt64(is_last ? (count + 1) / 2 : lanes / 2), 1, none, [&](Value* i, Values&) {
        Value* other = ir_.CreateAdd(i, ir_.getInt64(lanes / 2));
        const auto load_either = [&](Value* row) {
          return is_first ? load_row(row)
                          : load(unit_.dwords(ir_), advance(ir_, at(from), times(row, register_bytes())),
                                 static_cast<int>(register_bytes()));
        };
        Value *a = load_either(i), *b = load_either(other);
        const std::int64_t step = is_last ? b_.rows * 4 : register_bytes();
        Value* pair = advance(ir_, is_last ? to : at(into), times(i, 2 * step));
        store_vector(ir_.CreateShuffleVector(a, b, low), pair);
        store_vector(ir_.CreateShuffleVector(a, b, high), advance(ir_, pair, step));
      });
      from = into;
      into = from == b_.squares ? b_.squares + lanes * register_bytes() : b_.squares;
    }
  }

  void clear_state() {
    for (int vector = 0; vector < b_.vectors; ++vector) {
      store_vector(float_constant(-FLT_MAX), at(b_.maxima + vector * register_bytes()));
      store_vector(float_constant(0), at(b_.sums + vector * register_bytes()));
    }
    Values none;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(round_up(b_.rows, b_.value_rows) * b_.dv_vectors), 1, none,
         [&](Value* i, Values&) {
           store_vector(float_constant(0), advance(ir_, at(b_.o), times(i, register_bytes())));
         });
  }

  // ---------------------------------------------------------------- K and V of a tile

  /// Row `key` of a tile, or its last one.
  Value* row_of(Value* tile, Value* stride, Value* key, Value* keys) {
    return advance(ir_, tile, ir_.CreateMul(smaller(key, ir_.CreateSub(keys, ir_.getInt64(1))), stride));
  }

  void widen_k(Value* k, Value* keys) {
    Values none;
    loop(ir_, ir_.getInt64(0), keys, 1, none, [&](Value* key, Values&) {
      Value* from = advance(ir_, k, ir_.CreateMul(key, k_stride_));
      Value* to = advance(ir_, at(b_.k_tile), times(key, b_.d * 4));
      loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.d), 8, none, [&](Value* i, Values&) {
        Value* eight = load(vector_of(ir_.getInt16Ty(), 8), advance(ir_, from, times(i, 2)), 2);
        ir_.CreateAlignedStore(widen(ir_, eight), advance(ir_, to, times(i, 4)), llvm::Align(32));
      });
    });
  }

  /// `count` elements of a row of V; zeros fill a register that they do not.
  Value* load_bits(Value* row, Value* element, std::int64_t count) {
    Value* bits = load(vector_of(ir_.getInt16Ty(), count), advance(ir_, row, times(element, 2)), 2);
    if (count >= unit_.lanes)
      return bits;
    llvm::SmallVector<int, 16> filled;
    for (int i = 0; i < unit_.lanes; ++i)
      filled.push_back(i < count ? i : static_cast<int>(count));
    return ir_.CreateShuffleVector(bits, llvm::Constant::getNullValue(bits->getType()), filled);
  }

  /// Registers [first, first + count) of the values of one or, as pairs, two keys. `last`: the row ends in the last
  /// one, and lanes beyond dv are 0.
  Values load_values(const Values& rows, Value* first, int count, bool last) {
    const int lanes = unit_.lanes;
    const std::int64_t elements_of_last = b_.dv - (b_.dv_vectors - 1) * lanes;
    Value* element = times(first, lanes);
    Values out;
    for (int i = 0; i < count; ++i) {
      Value* from = ir_.CreateAdd(element, ir_.getInt64(i * lanes));
      const std::int64_t elements = last && i == count - 1 ? elements_of_last : lanes;
      if (unit_.width == 1) {
        out.push_back(ir_.CreateBitCast(widen(ir_, load_bits(rows[0], from, elements)), unit_.dwords(ir_)));
      } else if (i + 1 < count && (!last || i + 2 < count || elements_of_last == lanes)) {
        Value *a = load_bits(rows[0], from, 2 * lanes), *b = load_bits(rows[1], from, 2 * lanes);
        for (int half = 0; half < 2; ++half) { // registers i and i + 1
          llvm::SmallVector<int, 32> interleaved;
          for (int j = 0; j < lanes; ++j)
            interleaved.append({half * lanes + j, 2 * lanes + half * lanes + j});
          out.push_back(ir_.CreateBitCast(ir_.CreateShuffleVector(a, b, interleaved), unit_.dwords(ir_)));
        }
        ++i;
      } else {
        Value *low = ir_.CreateZExt(load_bits(rows[0], from, elements), unit_.dwords(ir_)),
              *high = ir_.CreateZExt(load_bits(rows[1], from, elements), unit_.dwords(ir_));
        out.push_back(ir_.CreateOr(low, ir_.CreateShl(high, llvm::ConstantInt::get(unit_.dwords(ir_), 16))));
      }
    }
    return out;
  }

  /// The chunks of value_vectors registers that a row of V falls into, the whole ones in a loop: body(first register,
  /// registers, whether the last register of the row is among them).
  void for_chunks(llvm::function_ref<void(Value* first, int count, bool last)> body) {
    const int chunk = b_.value_vectors;
    const bool padded = b_.dv % unit_.lanes != 0;
    const std::int64_t whole = (padded ? b_.dv_vectors - 1 : b_.dv_vectors) / chunk * chunk;
    Values none;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), chunk, none,
         [&](Value* first, Values&) { body(first, chunk, false); });
    if (whole < b_.dv_vectors)
      body(ir_.getInt64(whole), static_cast<int>(b_.dv_vectors - whole), true);
  }
  Values key_rows(Value* tile, Value* key, Value* keys) {
    Values rows;
    for (int i = 0; i < unit_.width; ++i)
      rows.push_back(row_of(tile, v_stride_, ir_.CreateAdd(key, ir_.getInt64(i)), keys));
    return rows;
  }
  Value* v_chunk(Value* first) {
    return advance(ir_, at(b_.v_tile), times(first, b_.tile / unit_.width * register_bytes()));
  }

  void rearrange_v(Value* v, Value* keys, Value* padded) {
    Values none;
    for_chunks([&](Value* first, int count, bool last) {
      Values to{v_chunk(first)};
      loop(ir_, ir_.getInt64(0), padded, unit_.width, to, [&](Value* key, Values& at) {
        const Values vectors = load_values(key_rows(v, key, keys), first, count, last);
        for (int i = 0; i < count; ++i)
          store_vector(vectors[static_cast<std::size_t>(i)], advance(ir_, at[0], i * register_bytes()));
        at[0] = advance(ir_, at[0], count * register_bytes());
      });
    });
  }

  // ---------------------------------------------------------------- S = K · Qᵀ

  void score(Value* k, Value* v, Value* keys, Value* row_vectors) {
    // A block that ends the rows has fewer registers of them.
    for (int vectors = 1; vectors <= b_.vectors; ++vectors) {
      if (b_.few) {
        if (vectors == b_.vectors)
          score_vectors(k, v, keys, vectors);
        continue;
      }
      when(ir_, ir_.CreateICmpEQ(row_vectors, ir_.getInt64(vectors)), [&] { score_vectors(k, v, keys, vectors); });
    }
  }

  void score_vectors(Value* k, Value* v, Value* keys, int vectors) {
    Values none;
    loop(ir_, ir_.getInt64(0), keys, b_.keys, none, [&](Value* key, Values&) {
      Values rows;
      for (int i = 0; i < b_.keys; ++i) {
        Value* index = ir_.CreateAdd(key, ir_.getInt64(i));
        rows.push_back(b_.widens_k() ? advance(ir_, at(b_.k_tile), times(index, b_.d * 4))
                                     : row_of(k, k_stride_, index, keys));
      }
      if (b_.fetches_ahead) {
        prefetch_rows(k, k_stride_, ir_.CreateAdd(key, ir_.getInt64(kKeysAhead)), b_.d);
        prefetch_rows(v, v_stride_, key, b_.dv);
      }
      Values sums(static_cast<std::size_t>(b_.keys * vectors), float_constant(0));
      if (b_.few)
        multiply_few(rows, sums);
      else
        multiply_many(rows, vectors, sums);
      Value* to = advance(ir_, at(b_.scores), times(key, b_.row_lanes * 4));
      const std::size_t per_row = static_cast<std::size_t>(b_.lanes_per_row);
      for (int vector = 0; vector < vectors; ++vector)
        for (std::size_t first = 0; first < rows.size(); first += per_row) {
          Values group;
          for (std::size_t i = 0; i < per_row; ++i)
            group.push_back(sums[(first + i) * static_cast<std::size_t>(vectors) + static_cast<std::size_t>(vector)]);
          store_vector(
              sum_of_lanes(group),
              advance(ir_, to, vector * b_.scores_vector + static_cast<std::int64_t>(first) * b_.row_lanes * 4));
        }
    });
  }

  /// Fetches one step's rows from `key` on into the cache, in the order of memory.
  void prefetch_rows(Value* tile, Value* stride, Value* key, std::int64_t elements) {
    Values row{advance(ir_, tile, ir_.CreateMul(key, stride))};
    loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.keys), 1, row, [&](Value*, Values& now) {
      for (std::int64_t byte = 0; byte < elements * 2; byte += kCacheLine)
        ir_.CreateIntrinsic(llvm::Intrinsic::prefetch, {ir_.getPtrTy()},
                            {advance(ir_, now[0], byte), ir_.getInt32(0), ir_.getInt32(3), ir_.getInt32(1)});
      now[0] = advance(ir_, now[0], stride);
    });
  }

  /// sums[key · vectors + vector], one lane a row.
  void multiply_many(const Values& rows, int vectors, Values& sums) {
    constexpr int kUnroll = 4;
    const std::int64_t dwords = b_.d / unit_.width;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(dwords), kUnroll, sums, [&](Value* dword, Values& at_sums) {
      Value* q = advance(ir_, at(b_.q), times(dword, b_.rows * 4));
      llvm::SmallVector<Values, 4> keys;
      for (Value* row : rows)
        keys.push_back(unit_.splats(ir_, advance(ir_, row, times(dword, 4)), kUnroll));
      for (int i = 0; i < kUnroll; ++i) {
        Values queries;
        for (int vector = 0; vector < vectors; ++vector)
          queries.push_back(load(unit_.dwords(ir_), advance(ir_, q, i * b_.rows * 4 + vector * register_bytes()),
                                 static_cast<int>(register_bytes())));
        for (std::size_t key = 0; key < rows.size(); ++key)
          for (int vector = 0; vector < vectors; ++vector) {
            Value*& sum = at_sums[key * static_cast<std::size_t>(vectors) + static_cast<std::size_t>(vector)];
            sum =
                unit_.dot(ir_, sum, queries[static_cast<std::size_t>(vector)], keys[key][static_cast<std::size_t>(i)]);
          }
      }
    });
  }

  /// Likewise, lanes_per_row lanes a row.
  void multiply_few(const Values& rows, Values& sums) {
    const std::int64_t per_row = b_.lanes_per_row, dwords = b_.d / unit_.width;
    const auto step = [&](Value* chunk, Values& at_sums, llvm::function_ref<Value*(Value * row)> load_key) {
      Value* q = advance(ir_, at(b_.q), times(chunk, b_.rows * per_row * 4));
      Values queries;
      for (int vector = 0; vector < b_.vectors; ++vector)
        queries.push_back(
            load(unit_.dwords(ir_), advance(ir_, q, vector * register_bytes()), static_cast<int>(register_bytes())));
      llvm::SmallVector<int, 16> repeated;
      for (int i = 0; i < unit_.lanes; ++i)
        repeated.push_back(i % static_cast<int>(per_row));
      for (std::size_t key = 0; key < rows.size(); ++key) {
        Value* piece = ir_.CreateShuffleVector(load_key(rows[key]), repeated);
        for (std::size_t vector = 0; vector < queries.size(); ++vector) {
          Value*& sum = at_sums[key * queries.size() + vector];
          sum = unit_.dot(ir_, sum, queries[vector], piece);
        }
      }
    };
    const std::int64_t whole = dwords / per_row;
    const int unroll = whole % 4 == 0 ? 4 : whole % 2 == 0 ? 2 : 1;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), unroll, sums, [&](Value* chunk, Values& at_sums) {
      for (int i = 0; i < unroll; ++i) {
        Value* index = ir_.CreateAdd(chunk, ir_.getInt64(i));
        step(index, at_sums, [&](Value* row) { return load_dwords(row, times(index, per_row), per_row); });
      }
    });
    if (const std::int64_t rest = dwords % per_row)
      step(ir_.getInt64(whole), sums,
           [&](Value* row) { return load_last_dwords(row, whole * per_row, rest, per_row); });
  }

  /// Of lanes_per_row keys' sums in lanes_per_row pieces each, one vector with the whole sums: key j in lane j of each
  /// row's lanes.
  Value* sum_of_lanes(Values group) {
    const int per_row = b_.lanes_per_row;
    for (int pieces = per_row; pieces > 1; pieces /= 2) { // lanes of a key
      llvm::SmallVector<int, 16> first, second;
      for (int i = 0; i < unit_.lanes; ++i) {
        const int row = i / per_row * per_row, lane = i % per_row, half = pieces / 2;
        const int key = lane / half, keys = per_row / pieces; // of each operand
        const int from = (key < keys ? 0 : unit_.lanes) + row + key % keys * pieces + lane % half;
        first.push_back(from);
        second.push_back(from + half);
      }
      Values next;
      for (std::size_t i = 0; i < group.size(); i += 2)
        next.push_back(ir_.CreateFAdd(ir_.CreateShuffleVector(group[i], group[i + 1], first),
                                      ir_.CreateShuffleVector(group[i], group[i + 1], second)));
      group = next;
    }
    return group[0];
  }

  // ---------------------------------------------------------------- softmax

  /// Over the lanes of each row, in all of them.
  Value* over_lanes_of_row(Value* v, llvm::function_ref<Value*(Value*, Value*)> combine) {
    for (int distance = 1; distance < b_.lanes_per_row; distance *= 2) {
      llvm::SmallVector<int, 16> other;
      for (int i = 0; i < unit_.lanes; ++i)
        other.push_back(i ^ distance);
      v = combine(v, ir_.CreateShuffleVector(v, other));
    }
    return v;
  }

  /// Scores to P, in place; maxima, sums, and the factors for O.
  void soften(Value* key, Value* padded, Value* row_vectors, Value* masked) {
    for_row_vectors(row_vectors, [&](Value* vector) {
      Value* scores = advance(ir_, at(b_.scores), times(vector, b_.scores_vector));
      Value* state = times(vector, register_bytes());
      when(ir_, masked, [&] { mask(scores, advance(ir_, at(b_.limits), state), key, padded); });

      Value* maxima = advance(ir_, at(b_.maxima), state);
      Value* old_max = load_floats(maxima);
      Value* tile_max =
          over_lanes_of_row(greatest(scores, padded), [&](Value* a, Value* b) { return greater(ir_, a, b); });
      Value* max = greater(ir_, ir_.CreateFMul(tile_max, scale_), old_max);
      store_vector(max, maxima);
      Value* factor = exp2_of_negative(ir_, ir_.CreateFSub(old_max, max));
      store_vector(factor, advance(ir_, at(b_.factors), state));
      Value* sums = advance(ir_, at(b_.sums), state);
      store_vector(ir_.CreateFAdd(ir_.CreateFMul(load_floats(sums), factor), exponentiate(scores, padded, max)), sums);
    });
  }

  /// Registers of scores in one step of a loop: even, and a divisor of a tile's.
  int scores_unroll() const { return b_.lanes_per_row == 1 ? b_.keys : 1; }

  /// -infinity for the keys that a row does not see.
  void mask(Value* scores, Value* limits, Value* key, Value* padded) {
    llvm::SmallVector<llvm::Constant*, 16> lanes;
    for (int i = 0; i < unit_.lanes; ++i)
      lanes.push_back(ir_.getInt32(static_cast<std::uint32_t>(i % b_.lanes_per_row)));
    Value* first =
        ir_.CreateAdd(ir_.CreateVectorSplat(static_cast<unsigned>(unit_.lanes), ir_.CreateTrunc(key, ir_.getInt32Ty())),
                      llvm::ConstantVector::get(lanes));
    Value* limit = load(unit_.dwords(ir_), limits, static_cast<int>(register_bytes()));
    Values carried{first, scores};
    loop(ir_, ir_.getInt64(0), padded, b_.lanes_per_row, carried, [&](Value*, Values& now) {
      Value* visible = ir_.CreateICmpSLT(now[0], limit);
      store_vector(
          ir_.CreateSelect(visible, load_floats(now[1]), llvm::ConstantFP::getInfinity(unit_.floats(ir_), true)),
          now[1]);
      now[0] = ir_.CreateAdd(now[0],
                             llvm::ConstantInt::get(unit_.dwords(ir_), static_cast<std::uint64_t>(b_.lanes_per_row)));
      now[1] = advance(ir_, now[1], register_bytes());
    });
  }

  Value* greatest(Value* scores, Value* padded) {
    const int unroll = scores_unroll();
    Values maxima(static_cast<std::size_t>(unroll), llvm::ConstantFP::getInfinity(unit_.floats(ir_), true));
    loop(ir_, ir_.getInt64(0), padded, unroll * b_.lanes_per_row, maxima, [&](Value* key, Values& now) {
      Value* from = advance(ir_, scores, times(key, b_.row_lanes * 4));
      for (int i = 0; i < unroll; ++i) {
        Value*& max = now[static_cast<std::size_t>(i)];
        max = greater(ir_, load_floats(advance(ir_, from, i * register_bytes())), max);
      }
    });
    Value* max = maxima[0];
    for (int i = 1; i < unroll; ++i)
      max = greater(ir_, maxima[static_cast<std::size_t>(i)], max);
    return max;
  }

  /// P in place of the scores, as dwords of unit.width keys; their sums, lane by lane.
  Value* exponentiate(Value* scores, Value* padded, Value* max) {
    const int unroll = scores_unroll();
    const bool pairs_registers = unit_.width == 2 && b_.lanes_per_row == 1;
    const std::int64_t out_bytes =
        unit_.width == 2 ? register_bytes() / 2 : register_bytes(); // of a register of scores
    Value* negative_max = ir_.CreateFNeg(max);
    Values carried{float_constant(0), float_constant(0), scores, scores};
    loop(ir_, ir_.getInt64(0), padded, unroll * b_.lanes_per_row, carried, [&](Value*, Values& now) {
      Values p;
      for (int i = 0; i < unroll; ++i) {
        Value* score = load_floats(advance(ir_, now[2], i * register_bytes()));
        Value* x = ir_.CreateIntrinsic(llvm::Intrinsic::fmuladd, {unit_.floats(ir_)}, {score, scale_, negative_max});
        p.push_back(exp2_of_negative(ir_, x));
        Value*& sum = now[static_cast<std::size_t>(i % 2)];
        sum = ir_.CreateFAdd(sum, p.back());
      }
      for (int i = 0; i < unroll; i += pairs_registers ? 2 : 1) {
        Value* to = advance(ir_, now[3], i * out_bytes);
        const std::size_t first = static_cast<std::size_t>(i);
        if (pairs_registers)
          store_vector(unit_.narrow_pairs(ir_, p[first], p[first + 1]), to);
        else if (unit_.width == 2)
          ir_.CreateAlignedStore(unit_.narrow(ir_, p[first]), to, llvm::Align(static_cast<unsigned>(out_bytes)));
        else
          store_vector(p[first], to);
      }
      now[2] = advance(ir_, now[2], unroll * register_bytes());
      now[3] = advance(ir_, now[3], unroll * out_bytes);
    });
    return ir_.CreateFAdd(carried[0], carried[1]);
  }

  // ---------------------------------------------------------------- O = O · factor + P · V

  void accumulate(Value* v, Value* keys, Value* padded, Value* rows) {
    for_chunks([&](Value* first, int count, bool last) {
      Values none;
      if (b_.few)
        return accumulate_rows(v, keys, padded, first, count, last, ir_.getInt64(0));
      loop(ir_, ir_.getInt64(0), rows, b_.value_rows, none,
           [&](Value* row, Values&) { accumulate_rows(v, keys, padded, first, count, last, row); });
    });
  }

  /// Byte offset of row `row + i`'s dword in the first register of P, and of its factor.
  Value* lane_offset(Value* row, std::int64_t i, std::int64_t vector_bytes, std::int64_t row_bytes) {
    if (b_.few) // the first row is 0
      return ir_.getInt64(i / b_.row_lanes * vector_bytes + i % b_.row_lanes * row_bytes);
    // A step of rows stays within a register.
    Value* vector = ir_.CreateUDiv(row, ir_.getInt64(b_.row_lanes));
    Value* lane = ir_.CreateURem(row, ir_.getInt64(b_.row_lanes));
    return ir_.CreateAdd(ir_.CreateAdd(times(vector, vector_bytes), times(lane, row_bytes)),
                         ir_.getInt64(i * row_bytes));
  }

  void accumulate_rows(Value* v, Value* keys, Value* padded, Value* first, int count, bool last, Value* row) {
    const int rows = b_.value_rows;
    Value* o = advance(ir_, at(b_.o), ir_.CreateAdd(times(row, b_.o_row_bytes()), times(first, register_bytes())));
    Values sums;
    for (int i = 0; i < rows; ++i) {
      Value* factor = advance(ir_, at(b_.factors), lane_offset(row, i, register_bytes(), b_.lanes_per_row * 4));
      Value* splat = ir_.CreateVectorSplat(static_cast<unsigned>(unit_.lanes), load(ir_.getFloatTy(), factor, 4));
      for (int j = 0; j < count; ++j)
        sums.push_back(
            ir_.CreateFMul(load_floats(advance(ir_, o, i * b_.o_row_bytes() + j * register_bytes())), splat));
    }
    // P of a row: dwords of `p_step` after one another in each register's worth of keys.
    const std::int64_t p_row_bytes = b_.p_step() * 4, p_keys = b_.p_step() * unit_.width;
    const std::int64_t p_register = b_.row_lanes * p_row_bytes;
    Values p_rows;
    for (int i = 0; i < rows; ++i)
      p_rows.push_back(advance(ir_, at(b_.scores), lane_offset(row, i, b_.scores_vector, p_row_bytes)));
    Value* values = b_.few ? nullptr : v_chunk(first);
    loop(ir_, ir_.getInt64(0), padded, p_keys, sums, [&](Value* key, Values& at_sums) {
      Value* p_offset = times(ir_.CreateUDiv(key, ir_.getInt64(p_keys)), p_register);
      for (std::int64_t step = 0; step < b_.p_step(); ++step) {
        Values vectors;
        if (b_.few) {
          vectors =
              load_values(key_rows(v, ir_.CreateAdd(key, ir_.getInt64(step * unit_.width)), keys), first, count, last);
        } else {
          Value* from =
              advance(ir_, values, times(ir_.CreateUDiv(key, ir_.getInt64(unit_.width)), count * register_bytes()));
          for (int j = 0; j < count; ++j)
            vectors.push_back(
                load(unit_.dwords(ir_), advance(ir_, from, j * register_bytes()), static_cast<int>(register_bytes())));
        }
        Values weights;
        if (!b_.few)
          weights = unit_.splats(ir_, advance(ir_, p_rows[0], p_offset), rows);
        else
          for (int i = 0; i < rows; ++i)
            weights.push_back(unit_.splats(
                ir_, advance(ir_, advance(ir_, p_rows[static_cast<std::size_t>(i)], p_offset), step * 4), 1)[0]);
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < count; ++j) {
            Value*& sum = at_sums[static_cast<std::size_t>(i * count + j)];
            sum = unit_.dot(ir_, sum, vectors[static_cast<std::size_t>(j)], weights[static_cast<std::size_t>(i)]);
          }
      }
    });
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < count; ++j)
        store_vector(sums[static_cast<std::size_t>(i * count + j)],
                     advance(ir_, o, i * b_.o_row_bytes() + j * register_bytes()));
  }

  // ---------------------------------------------------------------- the end of a block of rows

  void finish(Value* first_row, Value* rows, Value* row_vectors) {
    for_row_vectors(row_vectors, [&](Value* vector) {
      Value* state = times(vector, register_bytes());
      Value* sums = advance(ir_, at(b_.sums), state);
      Value* sum = over_lanes_of_row(load_floats(sums), [&](Value* a, Value* b) { return ir_.CreateFAdd(a, b); });
      store_vector(sum, sums);
      Value* nothing = ir_.CreateFCmpOEQ(sum, float_constant(0));
      Value* inverse = ir_.CreateFDiv(float_constant(1), ir_.CreateSelect(nothing, float_constant(1), sum));
      store_vector(inverse, advance(ir_, at(b_.factors), state));
    });
    Value* partial = pointer(offsetof(Call, partial));
    Value* stats = pointer(offsetof(Call, stats));
    Value* o = pointer(offsetof(Call, o));
    Value* is_partial = ir_.CreateIsNotNull(partial);
    Value* first = ir_.CreateSub(first_row, row_begin_);
    Values none;
    loop(ir_, ir_.getInt64(0), rows, 1, none, [&](Value* row, Values&) {
      Value* from = advance(ir_, at(b_.o), times(row, b_.o_row_bytes()));
      Value* index = ir_.CreateAdd(first, row);
      Value* state = times(row, b_.lanes_per_row * 4);
      when(ir_, ir_.CreateIsNotNull(stats), [&] {
        Value* to = advance(ir_, stats, times(index, 8));
        ir_.CreateAlignedStore(load(ir_.getFloatTy(), advance(ir_, at(b_.maxima), state), 4), to, llvm::Align(4));
        ir_.CreateAlignedStore(load(ir_.getFloatTy(), advance(ir_, at(b_.sums), state), 4), advance(ir_, to, 4),
                               llvm::Align(4));
      });
      when(ir_, is_partial, [&] { store_row(from, advance(ir_, partial, times(index, b_.dv * 4)), nullptr); });
      when(ir_, ir_.CreateNot(is_partial), [&] {
        Value* offset = ir_.CreateLoad(ir_.getInt64Ty(), advance(ir_, at(b_.o_rows), times(row, 8)));
        store_row(from, advance(ir_, o, offset), load(ir_.getFloatTy(), advance(ir_, at(b_.factors), state), 4));
      });
    });
  }

  /// A row of O: bf16 of its product with `factor`, or as it is when that is null.
  void store_row(Value* from, Value* to, Value* factor) {
    const std::int64_t lanes = unit_.lanes, size = factor != nullptr ? 2 : 4;
    const auto store = [&](Value* first, std::int64_t count) {
      Value* sums = load(vector_of(ir_.getFloatTy(), count), advance(ir_, from, times(first, 4)), 4);
      if (factor != nullptr)
        sums = unit_.narrow(ir_, ir_.CreateFMul(sums, ir_.CreateVectorSplat(static_cast<unsigned>(count), factor)));
      ir_.CreateAlignedStore(sums, advance(ir_, to, times(first, size)), llvm::Align(static_cast<unsigned>(size)));
    };
    const std::int64_t whole = b_.dv / lanes * lanes;
    Values none;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), lanes, none, [&](Value* i, Values&) { store(i, lanes); });
    if (whole < b_.dv)
      store(ir_.getInt64(whole), b_.dv - whole);
  }

  llvm::IRBuilder<> ir_;
  Value* call_;
  const Blocking b_;
  const DotUnit& unit_;
  Value *workspace_ = nullptr, *key_begin_ = nullptr, *key_end_ = nullptr, *row_begin_ = nullptr, *row_end_ = nullptr;
  Value *visible_ = nullptr, *visible_step_ = nullptr, *scale_ = nullptr;
  Value *k_stride_ = nullptr, *v_stride_ = nullptr; ///< bytes
};

} // namespace

namespace {

/// With few rows bfdot reads K and V as they lie.
bool uses_bfmmla(const KernelDesc& desc, const Target& target) {
  return target.arch == Arch::aarch64 && target.features.has(Feature::bf16) && desc.value[attention::kM] == kAny;
}

} // namespace

llvm::Function* emit_attention(llvm::Module& module, const KernelDesc& desc, const Target& target) {
  llvm::LLVMContext& context = module.getContext();
  auto* type = llvm::FunctionType::get(llvm::Type::getVoidTy(context), {llvm::PointerType::getUnqual(context)}, false);
  auto* function = llvm::Function::Create(type, llvm::GlobalValue::ExternalLinkage, "attention", module);
  if (target.features.has(Feature::amx_bf16))
    emit_amx_attention(function, desc, target);
  else if (uses_bfmmla(desc, target))
    emit_bfmmla_attention(function, desc, target);
  else
    Attention(function, desc, target).emit();
  return function;
}

attention::Plan attention_plan(const KernelDesc& desc, const Target& target) {
  if (target.features.has(Feature::amx_bf16))
    return amx_blocking(desc).plan();
  if (uses_bfmmla(desc, target))
    return bfmmla_blocking(desc).plan();
  const Blocking b = blocking_of(desc, target);
  return {.block_rows = b.rows, .workspace_bytes = b.bytes, .makes_partials = true};
}

} // namespace kiln::generator
