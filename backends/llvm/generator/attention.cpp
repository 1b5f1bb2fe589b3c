#include "backends/llvm/generator/attention.h"

#include <algorithm>
#include <cfloat>
#include <numeric>

#include <llvm/IR/Module.h>

#include "backends/llvm/generator/attention_emitter.h"
#include "backends/llvm/generator/attention_matrix.h"

namespace kiln::generator {
namespace {

using llvm::Value;

/// The tile shapes and everything that follows from them: written once, for the code and for its launch plan.
///
/// Scores lie with rows along the lanes of a register. A kernel for many rows gives each row one lane, so that a dword
/// of a key, broadcast, multiplies `lanes` rows of Q: K is read as it lies, and maxima and sums need nothing across
/// lanes. With few rows, every load of a key is multiplied with each of row_lanes rows, and the products' lanes are
/// added so that a register holds the scores of lanes_per_row keys for each of them.
struct Blocking : RowState {
  std::int64_t d, dv;
  bool few;                   ///< rows: K and V are read once, as they lie
  bool one_query;             ///< the kernel's rows are one query's: `group` of them
  int vectors;                ///< registers of rows in a block
  int rows;                   ///< of a block: vectors · row_lanes
  int keys;                   ///< of one step of Q·K, a multiple of lanes_per_row and of unit.width
  int value_rows;             ///< rows in one step of P·V
  int value_vectors;          ///< registers of values in a chunk of P·V
  std::int64_t tile;          ///< most keys between two updates of the state, a multiple of `strip`
  std::int64_t strip;         ///< keys that all rows take in turn, a multiple of `keys`
  bool may_stream;            ///< some call has no more than kStreamedRows rows,
  bool always_streams;        ///< and so has every one
  std::int64_t streamed_tile; ///< what `tile` is then
  bool fetches;               ///< K and V ahead of their use
  std::int64_t q_dwords;      ///< of a row of Q, padded to whole registers where its rows are not along lanes
  std::int64_t dv_vectors;    ///< registers of a row of V, the last one padded
  // Workspace: byte offsets.
  std::int64_t squares;               ///< two of [lanes][lanes], for transposing Q
  std::int64_t q;                     ///< [q_dwords][vectors][lanes]; few rows [q_dwords / lanes][rows][lanes]
  std::int64_t scores, scores_vector; ///< f32 [vectors][tile / lanes_per_row][lanes], then P in its place
  std::int64_t o;                     ///< f32 [rows][dv_vectors][lanes]
  std::int64_t k_rest;                ///< few rows: bf16 [keys][d], the last keys where they are fewer
  std::int64_t k_tile;                ///< many rows without bf16 instructions: f32 [tile][d]
  std::int64_t v_tile;                ///< many rows: chunks of value_vectors, each [tile / width][value_vectors][lanes]
  std::int64_t bytes;

  bool widens_k() const { return !few && unit.width == 1; }
  bool adds_lanes() const { return few && lanes_per_row() > 1; } ///< of products, to make scores
  std::int64_t o_row_bytes() const { return dv_vectors * unit.lanes * 4; }
  std::int64_t p_step() const {
    return std::max(lanes_per_row() / unit.width, 1);
  } ///< dwords of P in one register's row
  /// Whether a call may leave `rest` rows over when it takes `step`, a power of two, at a time.
  bool may_leave(std::int64_t rest, std::int64_t step) const {
    return one_query ? group % step == rest : rest % std::gcd(group, step) == 0;
  }
  /// Whether this power of two may be in the sum of those that make the number of rows.
  bool may_add(std::int64_t power) const { return one_query ? (group & power) != 0 : group % (2 * power) != 0; }
};

int power_of_two_below(std::int64_t v) {
  int power = 1;
  while (power * 2 <= v)
    power *= 2;
  return power;
}

/// So many rows are through with a key sooner than memory has the next one.
constexpr std::int64_t kStreamedRows = 4;

/// Keys of few rows, of a tile and of a strip of it. `streamed`: at most kStreamedRows of them, for which K and V come
/// from memory side by side: each tile fetches its values while it makes its scores, so that neither softmax nor what
/// the processor holds in flight decides how much of memory's time is used. That takes tiles of no more than it holds:
/// with one row, those of 4096 bytes read memory on Zen 4 at 0.94 of its speed, those of 8192 and 16384 at 0.7, and
/// those of 4096 without fetching at 0.73. More rows take long enough over a strip to fetch the next one, and the tile
/// is as long as scores have room in L2.
struct KeysOfFew {
  std::int64_t tile, strip;
};
KeysOfFew keys_of_few(std::int64_t d, std::int64_t dv, int lanes, bool streamed) {
  constexpr std::int64_t kStreamedBytes = 4096, kStripBytes = 8192, kLeast = 16, kMost = 64, kStrips = 8;
  if (lanes < 16) // each key takes longer
    return {kMost, kMost};
  const auto keys = [&](std::int64_t bytes, std::int64_t columns) -> std::int64_t {
    return std::clamp(std::int64_t{power_of_two_below(bytes / (2 * columns))}, kLeast, kMost);
  };
  if (streamed)
    return {keys(kStreamedBytes, d), keys(kStreamedBytes, d)};
  const std::int64_t strip = keys(kStripBytes, std::max(d, dv));
  return {kStrips * strip, strip};
}

Blocking blocking_of(const KernelDesc& desc, const Target& target) {
  Blocking b{};
  b.unit = DotUnit::of(target);
  b.group = attention::group_of(desc);
  b.d = desc.value[attention::kD];
  b.dv = desc.value[attention::kDv];
  const std::int64_t m = desc.value[attention::kM];
  const int lanes = b.unit.lanes;
  const std::int64_t most_rows = m == kAny ? kAny : m * b.group;
  // Many rows make up for V's rearrangement, but come in whole registers. Pairs of V are interleaved at little cost
  // where shuffles and products have ports of their own.
  b.few =
      most_rows != kAny && (most_rows <= attention::kFewRows || b.unit.instruction == DotUnit::Instruction::vdpbf16ps);
  b.one_query = m == 1;
  b.dv_vectors = (b.dv + lanes - 1) / lanes;
  if (b.few) {
    constexpr std::int64_t kMostRows = 32; // whose O stays in L1 with a tile
    b.row_lanes = static_cast<int>(std::min<std::int64_t>(most_rows <= 2 ? most_rows : 4, lanes));
    b.vectors = static_cast<int>((std::min(most_rows, kMostRows) + b.row_lanes - 1) / b.row_lanes);
    b.keys = b.lanes_per_row() > 1 ? b.lanes_per_row() : 8;
    // Whole rows of V, if possible, so that memory is read in its order.
    const int sums = b.unit.rows * b.unit.value_vectors,
              rows = power_of_two_below(std::min<std::int64_t>(most_rows, b.row_lanes));
    b.value_rows = std::min(rows, b.unit.instruction == DotUnit::Instruction::vdpbf16ps
                                      ? power_of_two_below(sums / std::min<std::int64_t>(b.dv_vectors, 8))
                                      : b.unit.rows);
    b.value_vectors = std::min(sums / b.value_rows, 8);
    const std::int64_t least_rows = b.one_query ? b.group : attention::op().m_range(desc).min * b.group;
    const KeysOfFew streamed = keys_of_few(b.d, b.dv, lanes, true),
                    longest = keys_of_few(b.d, b.dv, lanes, most_rows <= kStreamedRows);
    b.may_stream = least_rows <= kStreamedRows;
    b.always_streams = most_rows <= kStreamedRows;
    b.fetches = lanes >= 16;
    b.tile = longest.tile;
    b.strip = b.may_stream ? std::max(longest.strip, streamed.strip) : longest.strip;
    b.streamed_tile = b.may_stream ? streamed.tile : b.tile;
  } else {
    b.row_lanes = lanes;
    b.vectors = b.unit.row_vectors;
    b.keys = b.unit.keys;
    b.value_rows = b.unit.rows;
    b.value_vectors = b.unit.value_vectors;
    // What a tile needs (scores, and of K and V what is rearranged) stays in the smallest L2 in use, 512 KiB.
    b.tile = round_up(b.widens_k() ? 64 : 128, b.keys);
    b.strip = b.streamed_tile = b.tile;
  }
  b.rows = b.vectors * b.row_lanes;
  b.value_vectors = static_cast<int>(std::min<std::int64_t>(b.value_vectors, b.dv_vectors));
  b.q_dwords = round_up(b.d / b.unit.width, b.adds_lanes() ? lanes : 1);

  WorkspaceLayout workspace;
  const auto take = [&](std::int64_t bytes) { return workspace.take(bytes); };
  b.lay_out(workspace, b.rows);
  b.squares = take(2 * lanes * lanes * 4);
  b.q = take(b.q_dwords * b.rows * 4);
  b.scores_vector = b.tile * b.row_lanes * 4;
  b.scores = take(b.vectors * b.scores_vector);
  b.o = take(round_up(b.rows, b.value_rows) * b.o_row_bytes());
  b.k_rest = take(b.few ? b.keys * b.d * 2 : 0);
  b.k_tile = take(b.widens_k() ? b.tile * b.d * 4 : 0);
  b.v_tile = take(b.few ? 0 : b.tile / b.unit.width * b.dv_vectors * lanes * 4);
  b.bytes = workspace.bytes();
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
///
class Attention : AttentionEmitter {
public:
  Attention(llvm::Function* function, const Blocking& blocking) : AttentionEmitter(function, blocking), b_(blocking) {}

  void emit() {
    read_call();
    Values none;
    loop(ir_, row_begin_, row_end_, b_.rows, none, [&](Value* row, Values&) {
      Value* rows = smaller(ir_.CreateSub(row_end_, row), ir_.getInt64(b_.rows));
      Value* last = ir_.CreateSub(ir_.CreateAdd(row, rows), ir_.getInt64(1));
      set_up_rows(row, last, ir_.getInt64(b_.rows));
      transpose_q();
      clear_state();
      // Later queries see no less than earlier ones.
      Value* seen_by_all = limit_of(row);
      Value* seen_by_any = limit_of(last);
      const Block block{rows,
                        ir_.CreateUDiv(ir_.CreateAdd(rows, ir_.getInt64(b_.row_lanes - 1)), ir_.getInt64(b_.row_lanes)),
                        seen_by_all, seen_by_any,
                        b_.always_streams ? ir_.getTrue()
                        : b_.may_stream   ? ir_.CreateICmpSLE(rows, constant(kStreamedRows))
                                          : ir_.getFalse()};
      Value* tile_keys = ir_.CreateSelect(block.is_streamed, constant(b_.streamed_tile), constant(b_.tile));
      Value* keys = ir_.CreateSub(seen_by_any, key_begin_);
      loop(ir_, constant(0), keys, tile_keys, none, [&](Value* key, Values&) {
        const Tile tile = tile_at(ir_.CreateAdd(key_begin_, key), tile_keys, block);
        if (b_.widens_k())
          widen_k(tile);
        if (!b_.few)
          rearrange_v(tile);
        for_strips(tile, [&](const Tile& strip) { score(strip, block); });
        soften(tile, block);
        for_strips(tile, [&](const Tile& strip) { accumulate(strip, block); });
      });
      finish(row, block);
    });
    ir_.CreateRetVoid();
  }

private:
  /// Rows that are taken through the keys together.
  struct Block {
    Value *rows, *row_vectors;        ///< registers of them in use
    Value *seen_by_all, *seen_by_any; ///< keys below
    Value* is_streamed;               ///< they are kStreamedRows or fewer
  };
  /// Keys that are taken together.
  struct Tile {
    Value *key, *keys; ///< the first, and how many
    Value* padded;     ///< keys whose scores are looked at
    Value *k, *v;      ///< the first key's rows
    Value* is_streamed;
    Value *scores, *p; ///< of the first key: the same place, in which P takes 1 / unit.width of it
  };
  Tile tile_at(Value* key, Value* tile_keys, const Block& block) {
    Value* keys = smaller(ir_.CreateSub(block.seen_by_any, key), tile_keys);
    return {key,
            keys,
            round_up_to(keys, scores_unroll() * b_.lanes_per_row()),
            advance(ir_, k_, ir_.CreateMul(key, k_stride_)),
            advance(ir_, v_, ir_.CreateMul(key, v_stride_)),
            block.is_streamed,
            at(b_.scores),
            at(b_.scores)};
  }
  /// Runs body(strip) for each piece of a tile whose K or V stays in L1 from one step of rows to the next.
  void for_strips(const Tile& tile, llvm::function_ref<void(const Tile& strip)> body) {
    if (b_.strip == b_.tile)
      return body(tile);
    Values none;
    loop(ir_, ir_.getInt64(0), tile.keys, b_.strip, none, [&](Value* first, Values&) {
      Value* keys = smaller(ir_.CreateSub(tile.keys, first), ir_.getInt64(b_.strip));
      body({ir_.CreateAdd(tile.key, first), keys, keys, advance(ir_, tile.k, ir_.CreateMul(first, k_stride_)),
            advance(ir_, tile.v, ir_.CreateMul(first, v_stride_)), tile.is_streamed,
            advance(ir_, tile.scores, times(first, b_.row_lanes * 4)),
            advance(ir_, tile.p, times(first, b_.row_lanes * 4 / unit_.width))});
    });
  }

  /// Runs body(vector) for each register of rows in use; the byte offset of its state.
  void for_row_vectors(Value* row_vectors, llvm::function_ref<void(Value* vector)> body) {
    if (b_.vectors == 1)
      return body(ir_.getInt64(0));
    Values none;
    loop(ir_, ir_.getInt64(0), row_vectors, 1, none, [&](Value* vector, Values&) { body(vector); });
  }

  // ---------------------------------------------------------------- Q

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

  /// Q as the workspace has it.
  void transpose_q() {
    const std::int64_t lanes = unit_.lanes, dwords = b_.d / unit_.width;
    Values none;
    if (b_.adds_lanes()) { // a register's worth of each row stays together
      loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.rows), 1, none, [&](Value* row, Values&) {
        Value* from = q_row(row);
        Value* to = advance(ir_, at(b_.q), times(row, register_bytes()));
        const std::int64_t whole = dwords / lanes;
        loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), 1, none, [&](Value* chunk, Values&) {
          store_register(load_dwords(from, times(chunk, lanes), lanes),
                         advance(ir_, to, times(chunk, b_.rows * register_bytes())));
        });
        if (const std::int64_t rest = dwords % lanes)
          store_register(load_last_dwords(from, whole * lanes, rest, lanes),
                         advance(ir_, to, whole * b_.rows * register_bytes()));
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
        store_register(ir_.CreateShuffleVector(a, b, low), pair);
        store_register(ir_.CreateShuffleVector(a, b, high), advance(ir_, pair, step));
      });
      from = into;
      into = from == b_.squares ? b_.squares + lanes * register_bytes() : b_.squares;
    }
  }

  void clear_state() {
    for (int vector = 0; vector < b_.vectors; ++vector) {
      store_register(float_constant(-FLT_MAX), at(b_.maxima + vector * register_bytes()));
      store_register(float_constant(0), at(b_.sums + vector * register_bytes()));
    }
    Values none;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(round_up(b_.rows, b_.value_rows) * b_.dv_vectors), 1, none,
         [&](Value* i, Values&) {
           store_register(float_constant(0), advance(ir_, at(b_.o), times(i, register_bytes())));
         });
  }

  // ---------------------------------------------------------------- K and V of a tile

  void widen_k(const Tile& tile) {
    Values none;
    loop(ir_, ir_.getInt64(0), tile.keys, 1, none, [&](Value* key, Values&) {
      Value* from = advance(ir_, tile.k, ir_.CreateMul(key, k_stride_));
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

  /// Which value of two registers' worth is in lane `lane` of their first or second register, where pairs of keys are
  /// interleaved: x86 does that within 128 bits at no other cost.
  static int in_pair(int half, int lane) { return lane / 4 * 8 + half * 4 + lane % 4; }
  /// Values that come two registers at a time, in the order of in_pair().
  std::int64_t paired_values() const { return unit_.width == 2 ? b_.dv / (2 * unit_.lanes) * (2 * unit_.lanes) : 0; }

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
            interleaved.append({in_pair(half, j), 2 * lanes + in_pair(half, j)});
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
  /// V of the keys of one dword of P.
  Values value_rows(const Tile& tile, Value* key) {
    Values rows;
    for (int i = 0; i < unit_.width; ++i)
      rows.push_back(row_of(tile.v, v_stride_, ir_.CreateAdd(key, ir_.getInt64(i)), tile.keys));
    return rows;
  }
  Value* v_chunk(Value* first) {
    return advance(ir_, at(b_.v_tile), times(first, b_.tile / unit_.width * register_bytes()));
  }

  void rearrange_v(const Tile& tile) {
    for_chunks([&](Value* first, int count, bool last) {
      Values to{v_chunk(first)};
      loop(ir_, ir_.getInt64(0), tile.padded, unit_.width, to, [&](Value* key, Values& at) {
        const Values vectors = load_values(value_rows(tile, key), first, count, last);
        for (int i = 0; i < count; ++i)
          store_register(vectors[static_cast<std::size_t>(i)], advance(ir_, at[0], i * register_bytes()));
        at[0] = advance(ir_, at[0], count * register_bytes());
      });
    });
  }

  // ---------------------------------------------------------------- S = K · Qᵀ

  void score(const Tile& tile, const Block& block) {
    if (b_.few)
      return score_few(tile, block);
    // A block that ends the rows has fewer registers of them.
    for (int vectors = 1; vectors <= b_.vectors; ++vectors)
      when(ir_, ir_.CreateICmpEQ(block.row_vectors, ir_.getInt64(vectors)), [&] { score_vectors(tile, vectors); });
  }

  void score_vectors(const Tile& tile, int vectors) {
    Values none;
    loop(ir_, ir_.getInt64(0), tile.keys, b_.keys, none, [&](Value* key, Values&) {
      Values rows;
      for (int i = 0; i < b_.keys; ++i) {
        Value* index = ir_.CreateAdd(key, ir_.getInt64(i));
        rows.push_back(b_.widens_k() ? advance(ir_, at(b_.k_tile), times(index, b_.d * 4))
                                     : row_of(tile.k, k_stride_, index, tile.keys));
      }
      Values sums(static_cast<std::size_t>(b_.keys * vectors), float_constant(0));
      multiply_lanes(rows, at(b_.q), vectors, sums);
      Value* to = advance(ir_, tile.scores, times(key, register_bytes()));
      for (int i = 0; i < b_.keys; ++i)
        for (int vector = 0; vector < vectors; ++vector)
          store_register(sums[static_cast<std::size_t>(i * vectors + vector)],
                         advance(ir_, to, vector * b_.scores_vector + i * register_bytes()));
    });
  }

  /// Rows of Q, of which each has a lane of `vectors` registers, with dwords of keys: sums[key · vectors + vector].
  void multiply_lanes(const Values& rows, Value* q, int vectors, Values& sums) {
    // Products enough to hide the loop, and no more code to compile than that takes.
    const int unroll = unit_.multiplies_by_lane || vectors <= 2 ? 4 : 2;
    const std::int64_t dwords = b_.d / unit_.width;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(dwords), unroll, sums, [&](Value* dword, Values& at_sums) {
      Value* q_dword = advance(ir_, q, times(dword, b_.rows * 4));
      llvm::SmallVector<Values, 4> keys;
      for (Value* row : rows)
        keys.push_back(b_.few && unit_.width == 1 ? widened_splats(row, dword, unroll)
                                                  : unit_.splats(ir_, advance(ir_, row, times(dword, 4)), unroll));
      for (int i = 0; i < unroll; ++i) {
        Values queries;
        for (int vector = 0; vector < vectors; ++vector)
          queries.push_back(load(unit_.dwords(ir_), advance(ir_, q_dword, i * b_.rows * 4 + vector * register_bytes()),
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

  /// As splats(), of a row of bf16.
  Values widened_splats(Value* row, Value* first, int count) {
    Value* dwords = ir_.CreateBitCast(load_dwords(row, first, count), vector_of(ir_.getFloatTy(), count));
    Values splats;
    for (int i = 0; i < count; ++i)
      splats.push_back(
          ir_.CreateShuffleVector(dwords, llvm::SmallVector<int, 16>(static_cast<std::size_t>(unit_.lanes), i)));
    return splats;
  }

  // ---------------------------------------------------------------- the same with few rows

  void score_few(const Tile& tile, const Block& block) {
    // The last keys, where they are fewer than a step: followed by copies of the last one, whose scores are masked.
    Value* whole = ir_.CreateMul(ir_.CreateUDiv(tile.keys, ir_.getInt64(b_.keys)), ir_.getInt64(b_.keys));
    Values none;
    when(ir_, ir_.CreateICmpNE(tile.keys, whole), [&] {
      loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.keys), 1, none, [&](Value* key, Values&) {
        Value* from = row_of(tile.k, k_stride_, ir_.CreateAdd(whole, key), tile.keys);
        Value* to = advance(ir_, at(b_.k_rest), times(key, b_.d * 2));
        loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.d * 2), 16, none, [&](Value* byte, Values&) {
          llvm::Type* eight = vector_of(ir_.getInt16Ty(), 8);
          ir_.CreateAlignedStore(load(eight, advance(ir_, from, byte), 2), advance(ir_, to, byte), llvm::Align(16));
        });
      });
    });
    if (!b_.adds_lanes()) // a register costs the same however many rows it has
      return for_row_vectors(block.row_vectors, [&](Value* vector) { score_register(tile, vector, b_.row_lanes); });
    Value* vectors = ir_.CreateUDiv(block.rows, ir_.getInt64(b_.row_lanes));
    if (!b_.one_query || b_.group >= b_.row_lanes)
      for_row_vectors(vectors, [&](Value* vector) { score_register(tile, vector, b_.row_lanes); });
    Value* rest = ir_.CreateSub(block.rows, times(vectors, b_.row_lanes));
    for (int rows = 1; rows < b_.row_lanes; ++rows)
      if (b_.may_leave(rows, b_.row_lanes))
        when(ir_, ir_.CreateICmpEQ(rest, ir_.getInt64(rows)), [&] { score_register(tile, vectors, rows); });
  }

  /// Scores of a register's rows, of which the first `rows` are in use.
  void score_register(const Tile& tile, Value* vector, int rows) {
    Value* q = advance(ir_, at(b_.q), times(vector, (b_.adds_lanes() ? b_.row_lanes : 1) * register_bytes()));
    Value* scores = advance(ir_, tile.scores, times(vector, b_.scores_vector));
    const Values q_registers = load_q(q, rows);
    Values none;
    loop(ir_, ir_.getInt64(0), tile.keys, b_.keys, none, [&](Value* key, Values&) {
      Value* is_rest = ir_.CreateICmpSLT(ir_.CreateSub(tile.keys, key), ir_.getInt64(b_.keys));
      Value* stride = ir_.CreateSelect(is_rest, ir_.getInt64(b_.d * 2), k_stride_);
      Values keys{ir_.CreateSelect(is_rest, at(b_.k_rest), advance(ir_, tile.k, ir_.CreateMul(key, k_stride_)))};
      while (static_cast<int>(keys.size()) < b_.keys)
        keys.push_back(advance(ir_, keys.back(), stride));
      Value* to = advance(ir_, scores, times(key, b_.row_lanes * 4));
      if (b_.adds_lanes()) {
        for (int i = 0; i < b_.keys; i += b_.lanes_per_row())
          store_register(score_rows(llvm::ArrayRef(keys).slice(static_cast<std::size_t>(i),
                                                               static_cast<std::size_t>(b_.lanes_per_row())),
                                    fetched_at(tile, ir_.CreateAdd(key, constant(i))), q, q_registers, rows),
                         advance(ir_, to, i * b_.row_lanes * 4));
      } else {
        Values sums(keys.size(), float_constant(0));
        multiply_lanes(keys, q, 1, sums);
        for (int i = 0; i < b_.keys; ++i)
          store_register(sums[static_cast<std::size_t>(i)], advance(ir_, to, i * register_bytes()));
      }
    });
  }

  /// No load moves across this, and nothing is executed: left alone, LLVM's schedulers take keys from the last to the
  /// first, which memory's prefetching does not follow.
  void keep_order() { ir_.CreateFence(llvm::AtomicOrdering::AcquireRelease, llvm::SyncScope::SingleThread); }

  /// Has `bytes` from `from` on brought to L2. Not to L1, whose misses in flight are needed for what is used now: that
  /// halves what comes from memory.
  void fetch(Value* from, std::int64_t bytes) {
    constexpr int kLine = 64, kRead = 0, kL2 = 2, kData = 1;
    for (std::int64_t byte = 0; byte < bytes; byte += kLine)
      ir_.CreateIntrinsic(llvm::Intrinsic::prefetch, {ir_.getPtrTy()},
                          {advance(ir_, from, byte), ir_.getInt32(kRead), ir_.getInt32(kL2), ir_.getInt32(kData)});
  }

  /// All registers of `rows` rows of Q, [chunk][row], where they leave most of the machine's free.
  Values load_q(Value* q, int rows) {
    const std::int64_t chunks = b_.q_dwords / unit_.lanes;
    Values registers;
    if (b_.adds_lanes() && rows * chunks <= unit_.registers / 4)
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int row = 0; row < rows; ++row)
          registers.push_back(load_q(q, ir_.getInt64(chunk), row));
    return registers;
  }
  Value* load_q(Value* q, Value* chunk, int row) {
    Value* of_chunk = advance(ir_, q, times(chunk, b_.rows * register_bytes()));
    return load(unit_.dwords(ir_), advance(ir_, of_chunk, row * register_bytes()), static_cast<int>(register_bytes()));
  }

  /// What is fetched beside the keys of a step: with each of them `bytes` bytes.
  struct Fetched {
    Value *first, *stride;
    std::int64_t bytes;
  };
  /// The values of a tile that is streamed, or the keys of the next strip.
  Fetched fetched_at(const Tile& tile, Value* key) {
    Value* values = advance(ir_, tile.v, ir_.CreateMul(key, v_stride_));
    Value* keys = advance(ir_, tile.k, ir_.CreateMul(ir_.CreateAdd(key, constant(b_.strip)), k_stride_));
    return {ir_.CreateSelect(tile.is_streamed, values, keys), ir_.CreateSelect(tile.is_streamed, v_stride_, k_stride_),
            std::max(b_.may_stream ? b_.dv : 0, b_.always_streams ? 0 : b_.d) * 2};
  }

  /// The scores of lanes_per_row keys: key j of row r in lane r · lanes_per_row + j.
  Value* score_rows(llvm::ArrayRef<Value*> keys, const Fetched& fetched, Value* q, const Values& q_registers,
                    int rows) {
    const int per_row = b_.lanes_per_row();
    constexpr int kSums = 8; // with Q read from memory, enough for each load of it
    const int at_once = q_registers.empty() ? std::clamp(kSums / rows, 1, per_row) : 1;
    LaneSums lane_sums(ir_, unit_, per_row > 4); // in the order of keys
    for (int first = 0; first < per_row; first += at_once) {
      keep_order();
      if (b_.fetches)
        for (int i = first; i < first + at_once; ++i)
          fetch(advance(ir_, fetched.first, ir_.CreateMul(fetched.stride, constant(i))), fetched.bytes);
      Values sums(static_cast<std::size_t>(at_once * rows), float_constant(0));
      multiply_registers(keys.slice(static_cast<std::size_t>(first), static_cast<std::size_t>(at_once)), q, q_registers,
                         rows, sums);
      for (int i = 0; i < at_once; ++i)
        for (int row = 0; row < b_.row_lanes; ++row) // the rows that are not in use repeat the first
          lane_sums.set(row * per_row + first + i, sums[static_cast<std::size_t>(i * rows + (row < rows ? row : 0))]);
    }
    return lane_sums.all();
  }

  /// Registers along rows of Q and of keys: sums[key · rows + row], yet to be added over its lanes.
  void multiply_registers(llvm::ArrayRef<Value*> keys, Value* q, const Values& q_registers, int rows, Values& sums) {
    const std::int64_t lanes = unit_.lanes, dwords = b_.d / unit_.width, whole = dwords / lanes;
    const auto step = [&](Values& at_sums, llvm::function_ref<Value*(int row)> query,
                          llvm::function_ref<Value*(Value*)> load_key) {
      Values queries;
      for (int row = 0; row < rows; ++row)
        queries.push_back(query(row));
      for (std::size_t key = 0; key < keys.size(); ++key) {
        Value* register_of_key = load_key(keys[key]);
        for (std::size_t row = 0; row < queries.size(); ++row) {
          Value*& sum = at_sums[key * queries.size() + row];
          sum = unit_.dot(ir_, sum, queries[row], register_of_key);
        }
      }
    };
    const auto load_whole = [&](Value* chunk) {
      return [this, chunk, lanes](Value* row) { return load_dwords(row, times(chunk, lanes), lanes); };
    };
    const auto load_rest = [&](Value* row) { return load_last_dwords(row, whole * lanes, dwords % lanes, lanes); };
    if (!q_registers.empty()) {
      for (std::int64_t chunk = 0; chunk < b_.q_dwords / lanes; ++chunk) {
        const auto query = [&](int row) { return q_registers[static_cast<std::size_t>(chunk * rows + row)]; };
        if (chunk < whole)
          step(sums, query, load_whole(ir_.getInt64(chunk)));
        else
          step(sums, query, load_rest);
      }
      return;
    }
    const int unroll = whole % 4 == 0 ? 4 : whole % 2 == 0 ? 2 : 1;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), unroll, sums, [&](Value* first, Values& at_sums) {
      for (int i = 0; i < unroll; ++i) {
        Value* chunk = ir_.CreateAdd(first, ir_.getInt64(i));
        step(
            at_sums, [&](int row) { return load_q(q, chunk, row); }, load_whole(chunk));
      }
    });
    if (dwords % lanes != 0)
      step(
          sums, [&](int row) { return load_q(q, ir_.getInt64(whole), row); }, load_rest);
  }

  // ---------------------------------------------------------------- softmax

  /// Scores to P, in place; maxima, sums, and the factors for O.
  void soften(const Tile& tile, const Block& block) {
    Value* masked = ir_.CreateICmpSGT(ir_.CreateAdd(tile.key, tile.padded), block.seen_by_all);
    for_row_vectors(block.row_vectors, [&](Value* vector) {
      Value* scores = advance(ir_, tile.scores, times(vector, b_.scores_vector));
      Value* state = times(vector, register_bytes());
      when(ir_, masked, [&] {
        mask(scores, register_bytes(), advance(ir_, at(b_.limits), state), tile.key, ir_.getInt64(0), tile.padded);
      });

      Value* maxima = advance(ir_, at(b_.maxima), state);
      Value* sums = advance(ir_, at(b_.sums), state);
      Value* old_max = load_register(maxima);
      Value* lane_maxima = greatest(scores, tile.padded);
      Value* tile_max = over_lanes_of_row(lane_maxima, [&](Value* a, Value* b) { return greater(ir_, a, b); });
      tile_max = ir_.CreateFMul(tile_max, scale_);
      Value* max = greater(ir_, tile_max, old_max);
      const auto update = [&] {
        store_register(max, maxima);
        Value* factor = exp2_of_score(ir_, unit_, ir_.CreateFSub(old_max, max));
        store_register(factor, advance(ir_, at(b_.factors), state));
        store_register(ir_.CreateFMul(load_register(sums), factor), sums);
      };
      if (b_.few) { // O is multiplied here, and hardly ever: a tile's work is short beside it
        when(ir_, ir_.CreateOrReduce(ir_.CreateFCmpOGT(tile_max, old_max)), [&] {
          update();
          multiply_o(vector);
        });
      } else {
        update();
      }
      const Exponent exponent = exponent_of(scores, register_bytes(), tile.padded, lane_maxima, max);
      store_register(ir_.CreateFAdd(load_register(sums), exponentiate(scores, tile.padded, exponent)), sums);
    });
  }

  /// A register's rows of O by their factors.
  void multiply_o(Value* vector) {
    Values none;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.row_lanes), 1, none, [&](Value* lane, Values&) {
      Value* row = ir_.CreateAdd(times(vector, b_.row_lanes), lane);
      Value* factor = splat_float(advance(ir_, at(b_.factors), times(row, b_.lanes_per_row() * 4)));
      Value* o = advance(ir_, at(b_.o), times(row, b_.o_row_bytes()));
      loop(ir_, ir_.getInt64(0), ir_.getInt64(b_.o_row_bytes()), register_bytes(), none, [&](Value* byte, Values&) {
        store_register(ir_.CreateFMul(load_register(advance(ir_, o, byte)), factor), advance(ir_, o, byte));
      });
    });
  }

  /// Registers of scores in one step of a loop: a divisor of those of any padded tile, and even where pairs are
  /// narrowed.
  int scores_unroll() const {
    if (b_.lanes_per_row() == 1)
      return b_.keys;
    return static_cast<int>(std::min<std::int64_t>(b_.streamed_tile / b_.lanes_per_row(), 8));
  }

  Value* greatest(Value* scores, Value* padded) {
    const int unroll = scores_unroll();
    Values maxima(static_cast<std::size_t>(unroll), llvm::ConstantFP::getInfinity(unit_.floats(ir_), true));
    loop(ir_, ir_.getInt64(0), padded, unroll * b_.lanes_per_row(), maxima, [&](Value* key, Values& now) {
      Value* from = advance(ir_, scores, times(key, b_.row_lanes * 4));
      for (int i = 0; i < unroll; ++i) {
        Value*& max = now[static_cast<std::size_t>(i)];
        max = greater(ir_, load_register(advance(ir_, from, i * register_bytes())), max);
      }
    });
    Value* max = maxima[0];
    for (int i = 1; i < unroll; ++i)
      max = greater(ir_, maxima[static_cast<std::size_t>(i)], max);
    return max;
  }

  /// P in place of the scores, as dwords of unit.width keys; their sums, lane by lane.
  Value* exponentiate(Value* scores, Value* padded, const Exponent& exponent) {
    const int unroll = scores_unroll();
    const bool pairs_registers = unit_.width == 2 && b_.lanes_per_row() == 1;
    const std::int64_t out_bytes =
        unit_.width == 2 ? register_bytes() / 2 : register_bytes(); // of a register of scores
    Values carried{float_constant(0), float_constant(0), scores, scores};
    loop(ir_, ir_.getInt64(0), padded, unroll * b_.lanes_per_row(), carried, [&](Value*, Values& now) {
      Values p;
      for (int i = 0; i < unroll; ++i) {
        Value* score = load_register(advance(ir_, now[2], i * register_bytes()));
        Value* x = ir_.CreateIntrinsic(llvm::Intrinsic::fmuladd, {unit_.floats(ir_)},
                                       {score, exponent.scale, exponent.offset});
        p.push_back(x);
      }
      exp2_of_scores(ir_, unit_, p);
      for (int i = 0; i < unroll; ++i) {
        Value*& sum = now[static_cast<std::size_t>(i % 2)];
        sum = ir_.CreateFAdd(sum, p[static_cast<std::size_t>(i)]);
      }
      for (int i = 0; i < unroll; i += pairs_registers ? 2 : 1) {
        Value* to = advance(ir_, now[3], i * out_bytes);
        const std::size_t first = static_cast<std::size_t>(i);
        if (pairs_registers)
          store_register(unit_.narrow_pairs(ir_, p[first], p[first + 1]), to);
        else if (unit_.width == 2)
          ir_.CreateAlignedStore(unit_.narrow(ir_, p[first]), to, llvm::Align(static_cast<unsigned>(out_bytes)));
        else
          store_register(p[first], to);
      }
      now[2] = advance(ir_, now[2], unroll * register_bytes());
      now[3] = advance(ir_, now[3], unroll * out_bytes);
    });
    return ir_.CreateFAdd(carried[0], carried[1]);
  }

  // ---------------------------------------------------------------- O = O · factor + P · V

  void accumulate(const Tile& tile, const Block& block) {
    Values none;
    for_chunks([&](Value* first, int count, bool last) {
      const Chunk chunk{first, count, last};
      if (!b_.few) {
        loop(ir_, ir_.getInt64(0), block.rows, b_.value_rows, none,
             [&](Value* row, Values&) { accumulate_rows(tile, chunk, row, b_.value_rows); });
        return;
      }
      Value* row = ir_.CreateAnd(block.rows, ir_.getInt64(-b_.value_rows));
      loop(ir_, ir_.getInt64(0), row, b_.value_rows, none,
           [&](Value* row, Values&) { accumulate_rows(tile, chunk, row, b_.value_rows); });
      for (int rows = b_.value_rows / 2; rows > 0; rows /= 2) {
        if (!b_.may_add(rows))
          continue;
        Value* begin = row;
        when(ir_, ir_.CreateICmpNE(ir_.CreateAnd(block.rows, ir_.getInt64(rows)), ir_.getInt64(0)),
             [&] { accumulate_rows(tile, chunk, begin, rows); });
        row = ir_.CreateAdd(row, ir_.CreateAnd(block.rows, ir_.getInt64(rows)));
      }
    });
  }

  /// Registers of the values of a row.
  struct Chunk {
    Value* first;
    int count;
    bool last; ///< the row's last register is among them
  };

  /// Byte offset of row `row + i`'s dword in the first register of P, and of its factor. A step of rows stays within a
  /// register.
  Value* lane_offset(Value* row, std::int64_t i, std::int64_t vector_bytes, std::int64_t row_bytes) {
    Value* vector = ir_.CreateUDiv(row, ir_.getInt64(b_.row_lanes));
    Value* lane = ir_.CreateURem(row, ir_.getInt64(b_.row_lanes));
    return ir_.CreateAdd(ir_.CreateAdd(times(vector, vector_bytes), times(lane, row_bytes)),
                         ir_.getInt64(i * row_bytes));
  }
  /// The lane of row `row + i` in a piece of state.
  Value* state_of(std::int64_t state, Value* row, std::int64_t i) {
    return advance(ir_, at(state), lane_offset(row, i, register_bytes(), b_.lanes_per_row() * 4));
  }
  Value* splat_float(Value* from) {
    return ir_.CreateVectorSplat(static_cast<unsigned>(unit_.lanes), load(ir_.getFloatTy(), from, 4));
  }

  void accumulate_rows(const Tile& tile, const Chunk& chunk, Value* row, int rows) {
    Value* o =
        advance(ir_, at(b_.o), ir_.CreateAdd(times(row, b_.o_row_bytes()), times(chunk.first, register_bytes())));
    Values sums;
    for (int i = 0; i < rows; ++i) {
      Value* factor = b_.few ? nullptr : splat_float(state_of(b_.factors, row, i));
      for (int j = 0; j < chunk.count; ++j) {
        Value* sum = load_register(advance(ir_, o, i * b_.o_row_bytes() + j * register_bytes()));
        sums.push_back(factor == nullptr ? sum : ir_.CreateFMul(sum, factor));
      }
    }
    // The first row of them sees the fewest keys, and the last one the most.
    const std::int64_t p_keys = b_.p_step() * unit_.width; // a power of two
    const auto visible_to = [&](int i) {
      Value* limit = ir_.CreateSExt(load(ir_.getInt32Ty(), state_of(b_.limits, row, i), 4), ir_.getInt64Ty());
      return larger(smaller(ir_.CreateSub(limit, tile.key), tile.keys), ir_.getInt64(0));
    };
    Value* seen_by_all = ir_.CreateAnd(visible_to(0), ir_.getInt64(-p_keys));
    Value* seen_by_any = visible_to(rows - 1);
    if (b_.few)
      accumulate_few(tile, chunk, row, rows, seen_by_all, sums);
    else
      accumulate_many(tile, chunk, row, rows, seen_by_all, sums);
    accumulate_masked(tile, chunk, row, rows, seen_by_all, seen_by_any, sums);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < chunk.count; ++j)
        store_register(sums[static_cast<std::size_t>(i * chunk.count + j)],
                       advance(ir_, o, i * b_.o_row_bytes() + j * register_bytes()));
  }

  // P of a row: dwords of `p_step` after one another in each register's worth of keys.
  std::int64_t p_row_bytes() const { return b_.p_step() * 4; }
  std::int64_t p_register_bytes() const { return b_.row_lanes * p_row_bytes(); }
  Value* p_of(const Tile& tile, Value* row, int i) {
    return advance(ir_, tile.p, lane_offset(row, i, b_.scores_vector, p_row_bytes()));
  }

  void multiply_values(const Values& vectors, const Values& weights, Values& sums) {
    for (std::size_t i = 0; i < weights.size(); ++i)
      for (std::size_t j = 0; j < vectors.size(); ++j) {
        Value*& sum = sums[i * vectors.size() + j];
        sum = unit_.dot(ir_, sum, vectors[j], weights[i]);
      }
  }

  /// The keys [0, keys), which every row sees.
  void accumulate_few(const Tile& tile, const Chunk& chunk, Value* row, int rows, Value* keys, Values& sums) {
    Values p_rows;
    for (int i = 0; i < rows; ++i)
      p_rows.push_back(p_of(tile, row, i));
    Values carried = sums;
    carried.push_back(tile.v);
    const std::int64_t p_keys = b_.p_step() * unit_.width;
    // Those of a tile that is streamed are there.
    Value* ahead =
        ir_.CreateAdd(ir_.CreateSelect(tile.is_streamed, constant(0), ir_.CreateMul(constant(b_.strip), v_stride_)),
                      times(chunk.first, unit_.lanes * 2));
    loop(ir_, ir_.getInt64(0), keys, p_keys, carried, [&](Value* key, Values& now) {
      Value* p_offset = times(ir_.CreateUDiv(key, ir_.getInt64(p_keys)), p_register_bytes());
      Value* v = now.pop_back_val();
      for (std::int64_t step = 0; step < b_.p_step(); ++step) {
        keep_order();
        Values v_rows;
        for (int i = 0; i < unit_.width; ++i) {
          if (b_.fetches && !b_.always_streams)
            fetch(advance(ir_, v, ahead), chunk.count * unit_.lanes * 2);
          v_rows.push_back(v);
          v = advance(ir_, v, v_stride_);
        }
        const Values vectors = load_values(v_rows, chunk.first, chunk.count, chunk.last);
        Values weights;
        for (Value* p : p_rows)
          weights.push_back(unit_.splats(ir_, advance(ir_, advance(ir_, p, p_offset), step * 4), 1)[0]);
        multiply_values(vectors, weights, now);
      }
      now.push_back(v);
    });
    carried.pop_back();
    sums = carried;
  }

  /// The same of V as it was rearranged.
  void accumulate_many(const Tile& tile, const Chunk& chunk, Value* row, int rows, Value* keys, Values& sums) {
    Value* p = p_of(tile, row, 0);
    Value* values = v_chunk(chunk.first);
    loop(ir_, ir_.getInt64(0), keys, unit_.width, sums, [&](Value* key, Values& now) {
      Value* index = ir_.CreateUDiv(key, ir_.getInt64(unit_.width));
      const Values vectors = load_rearranged(values, index, chunk.count);
      multiply_values(vectors, unit_.splats(ir_, advance(ir_, p, times(index, p_register_bytes())), rows), now);
    });
  }
  Values load_rearranged(Value* values, Value* index, int count) {
    Value* from = advance(ir_, values, times(index, count * register_bytes()));
    Values vectors;
    for (int j = 0; j < count; ++j)
      vectors.push_back(
          load(unit_.dwords(ir_), advance(ir_, from, j * register_bytes()), static_cast<int>(register_bytes())));
    return vectors;
  }

  /// The keys [begin, end), of which each row sees its own number. P is 0 at those that it does not see, but what V
  /// holds there may be infinite or no number at all: it counts as 0.
  void accumulate_masked(const Tile& tile, const Chunk& chunk, Value* row, int rows, Value* begin, Value* end,
                         Values& sums) {
    const std::int64_t p_keys = b_.p_step() * unit_.width;
    loop(ir_, begin, end, unit_.width, sums, [&](Value* key, Values& now) {
      const Values vectors =
          b_.few ? load_values(value_rows(tile, key), chunk.first, chunk.count, chunk.last)
                 : load_rearranged(v_chunk(chunk.first), ir_.CreateUDiv(key, ir_.getInt64(unit_.width)), chunk.count);
      Value* p_offset =
          ir_.CreateAdd(times(ir_.CreateUDiv(key, ir_.getInt64(p_keys)), p_register_bytes()),
                        times(ir_.CreateUDiv(ir_.CreateURem(key, ir_.getInt64(p_keys)), ir_.getInt64(unit_.width)), 4));
      Value* absolute = ir_.CreateTrunc(ir_.CreateAdd(tile.key, key), ir_.getInt32Ty());
      for (int i = 0; i < rows; ++i) {
        Value* limit = load(ir_.getInt32Ty(), state_of(b_.limits, row, i), 4);
        Value* visible = nullptr; // the bits of a dword that belong to visible keys
        for (int element = 0; element < unit_.width; ++element) {
          const int bits = 32 / unit_.width;
          Value* sees =
              ir_.CreateICmpSLT(ir_.CreateAdd(absolute, ir_.getInt32(static_cast<std::uint32_t>(element))), limit);
          Value* of_element = ir_.CreateSelect(
              sees, ir_.getInt32(static_cast<std::uint32_t>(((std::uint64_t{1} << bits) - 1) << (element * bits))),
              ir_.getInt32(0));
          visible = visible == nullptr ? of_element : ir_.CreateOr(visible, of_element);
        }
        Value* mask = ir_.CreateVectorSplat(static_cast<unsigned>(unit_.lanes), visible);
        Value* weight = unit_.splats(ir_, advance(ir_, p_of(tile, row, i), p_offset), 1)[0];
        for (int j = 0; j < chunk.count; ++j) {
          Value*& sum = now[static_cast<std::size_t>(i * chunk.count + j)];
          sum = unit_.dot(ir_, sum, ir_.CreateAnd(vectors[static_cast<std::size_t>(j)], mask), weight);
        }
      }
    });
  }

  // ---------------------------------------------------------------- the end of a block of rows

  void finish(Value* first_row, const Block& block) {
    for_row_vectors(block.row_vectors, [&](Value* vector) { finish_sums(times(vector, register_bytes())); });
    store_rows(
        first_row, block.rows, b_.dv, [&](Value* row) { return advance(ir_, at(b_.o), times(row, b_.o_row_bytes())); },
        [&](Value* from, Value* to, Value* factor) { store_row(from, to, factor); });
  }

  /// A row of O: bf16 of its product with `factor`, or as it is when that is null.
  void store_row(Value* from, Value* to, Value* factor) {
    const std::int64_t lanes = unit_.lanes, size = factor != nullptr ? 2 : 4;
    const auto store = [&](Value* first, Value* sums) {
      const unsigned count = llvm::cast<llvm::FixedVectorType>(sums->getType())->getNumElements();
      if (factor != nullptr)
        sums = unit_.narrow(ir_, ir_.CreateFMul(sums, ir_.CreateVectorSplat(count, factor)));
      ir_.CreateAlignedStore(sums, advance(ir_, to, times(first, size)), llvm::Align(static_cast<unsigned>(size)));
    };
    const auto sums_of = [&](Value* first, std::int64_t count) {
      return load(vector_of(ir_.getFloatTy(), count), advance(ir_, from, times(first, 4)), 4);
    };
    Values none;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(paired_values()), 2 * lanes, none, [&](Value* first, Values&) {
      Value* second = ir_.CreateAdd(first, ir_.getInt64(lanes));
      Value *a = sums_of(first, lanes), *b = sums_of(second, lanes);
      llvm::SmallVector<int, 32> order(static_cast<std::size_t>(2 * lanes));
      for (int half = 0; half < 2; ++half)
        for (int lane = 0; lane < lanes; ++lane)
          order[static_cast<std::size_t>(in_pair(half, lane))] = static_cast<int>(half * lanes + lane);
      store(first, ir_.CreateShuffleVector(a, b, llvm::ArrayRef(order).take_front(static_cast<std::size_t>(lanes))));
      store(second, ir_.CreateShuffleVector(a, b, llvm::ArrayRef(order).take_back(static_cast<std::size_t>(lanes))));
    });
    const std::int64_t whole = b_.dv / lanes * lanes;
    loop(ir_, ir_.getInt64(paired_values()), ir_.getInt64(whole), lanes, none,
         [&](Value* i, Values&) { store(i, sums_of(i, lanes)); });
    if (whole < b_.dv)
      store(ir_.getInt64(whole), sums_of(ir_.getInt64(whole), b_.dv - whole));
  }

  const Blocking& b_;
};

} // namespace

namespace {

/// Up to kFewRows bfdot reads K and V as they lie.
bool uses_bfmmla(const KernelDesc& desc, const Target& target) {
  return target.arch == Arch::aarch64 && target.features.has(Feature::bf16) &&
         (desc.value[attention::kM] == kAny ||
          desc.value[attention::kM] * attention::group_of(desc) > attention::kFewRows);
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
    Attention(function, blocking_of(desc, target)).emit();
  return function;
}

attention::Plan attention_plan(const KernelDesc& desc, const Target& target) {
  if (target.features.has(Feature::amx_bf16))
    return amx_blocking(desc, target).plan();
  if (uses_bfmmla(desc, target))
    return bfmmla_blocking(desc, target).plan();
  const Blocking b = blocking_of(desc, target);
  return {.block_rows = b.rows, .workspace_bytes = b.bytes, .makes_partials = true};
}

} // namespace kiln::generator
