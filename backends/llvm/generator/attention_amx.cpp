#include <array>

#include <llvm/IR/Constants.h>
#include <llvm/IR/IntrinsicsX86.h>
#include <llvm/IR/Module.h>

#include "backends/llvm/generator/attention_matrix.h"

// attention on AMX. A product takes a tile A of 16 rows of 32 bf16 along the sum, and a tile B whose row i holds, for
// each of 16 columns, elements 2i and 2i + 1 along the sum, and adds to 16 × 16 f32 (Intel SDM volume 2, TDPBF16PS).
//
// Which operand is B: one of K and Q must have its dwords transposed, and so must one of V and P, or be interleaved.
// - S = Q · Kᵀ with B from K: transposed once per tile of K and block of rows; Q is copied, P has its rows along the
//   sum and is A as it comes out of the exponentials; V's keys are interleaved in pairs, without a transposition.
// - S = K · Qᵀ with B from Q would leave K as it lies, but leaves P with keys down its columns: then P must be
//   transposed, or V, the latter as often as K here, the former in every step of rows. 16 × 16 dwords take some 48
//   shuffles: 1/16 of that a tile of scores for K and 256 rows, all of it for P, beside 128 cycles of products and
//   about 160 of exponentials (D = 128).
// So K is B. At 16 rows a block, of the fewest that come here, K's transposition costs as much as its products, which
// vdpbf16ps would need eight times as long for.
namespace kiln::generator {
namespace {

using llvm::Value;

constexpr int kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;
constexpr int kTileDepth = 32; ///< bf16 in a row of A
constexpr int kTiles = 8;
constexpr int kLanes = 4;          ///< of 128 bits in a register, and dwords in such a lane
constexpr std::int64_t kChunk = 8; ///< elements of a row of Q and K that are rearranged at a time: a divisor of D

/// How far before their use keys and values are fetched: 16 rows at a time are no stream that the core would follow.
constexpr std::int64_t kKeysAhead = 32;

/// 2 × 2 tiles of sums, two of A and two of B: four loads for four products.
constexpr int kSums = 0, kA = 4, kB = 6;

std::int64_t depth_steps(std::int64_t d) {
  return (d + kTileDepth - 1) / kTileDepth;
}

class AmxAttention final : public MatrixAttention {
public:
  AmxAttention(llvm::Function* function, const MatrixBlocking& blocking)
      : MatrixAttention(function, blocking), module_(*function->getParent()) {}

private:
  // ---- tiles

  void ld_tile_config(Value* from) { ir_.CreateIntrinsic(llvm::Intrinsic::x86_ldtilecfg, {}, {from}); }
  void zero_tile(int tile) {
    ir_.CreateIntrinsic(llvm::Intrinsic::x86_tilezero, {}, {ir_.getInt8(static_cast<std::uint8_t>(tile))});
  }
  void load_tile(int tile, Value* from) {
    ir_.CreateIntrinsic(llvm::Intrinsic::x86_tileloadd64, {},
                        {ir_.getInt8(static_cast<std::uint8_t>(tile)), from, constant(kTileRowBytes)});
  }
  void store_tile(int tile, Value* to) {
    ir_.CreateIntrinsic(llvm::Intrinsic::x86_tilestored64, {},
                        {ir_.getInt8(static_cast<std::uint8_t>(tile)), to, constant(kTileRowBytes)});
  }
  void multiply(int sums, int a, int b) {
    ir_.CreateIntrinsic(llvm::Intrinsic::x86_tdpbf16ps, {},
                        {ir_.getInt8(static_cast<std::uint8_t>(sums)), ir_.getInt8(static_cast<std::uint8_t>(a)),
                         ir_.getInt8(static_cast<std::uint8_t>(b))});
  }
  static int sums_tile(int row_tile, int column) { return kSums + 2 * row_tile + column; }

  /// One step along the sum for row_tiles × columns tiles of sums.
  void multiply_step(int row_tiles, int columns, Value* a, Value* b, std::int64_t b_column_bytes) {
    for (int row_tile = 0; row_tile < row_tiles; ++row_tile)
      load_tile(kA + row_tile, advance(ir_, a, row_tile * kTileBytes));
    for (int column = 0; column < columns; ++column) {
      load_tile(kB + column, advance(ir_, b, column * b_column_bytes));
      for (int row_tile = 0; row_tile < row_tiles; ++row_tile)
        multiply(sums_tile(row_tile, column), kA + row_tile, kB + column);
    }
  }

  /// Tiles of sums from or to registers of scores or O: column after column a chunk further.
  void for_sums(int row_tiles, int columns, Value* at, llvm::function_ref<void(int tile, Value* at)> body) {
    for (int column = 0; column < columns; ++column)
      for (int row_tile = 0; row_tile < row_tiles; ++row_tile)
        body(sums_tile(row_tile, column), advance(ir_, at, column * b_.chunk_bytes() + row_tile * kTileBytes));
  }

  /// body(tiles of rows) for as many as the step's rows take: 1 or 2.
  void for_row_tiles(Value* rows, llvm::function_ref<void(int row_tiles)> body) {
    Value* is_one = ir_.CreateICmpSLE(rows, constant(kTileRows));
    when(ir_, is_one, [&] { body(1); });
    when(ir_, ir_.CreateNot(is_one), [&] { body(2); });
  }

  // ---- the call

  /// Palette 1, all tiles of 16 rows of 64 bytes. The caller's configuration is its own to keep; its tiles are not, a
  /// call may destroy them.
  void enter() override {
    std::array<std::uint8_t, 64> config{};
    config[0] = 1;
    for (std::size_t tile = 0; tile < kTiles; ++tile) {
      config[16 + 2 * tile] = kTileRowBytes;
      config[48 + tile] = kTileRows;
    }
    auto* content = llvm::ConstantDataArray::get(ir_.getContext(), config);
    auto* global = new llvm::GlobalVariable(module_, content->getType(), true, llvm::GlobalValue::PrivateLinkage,
                                            content, "tile_config");
    global->setAlignment(llvm::Align(64));
    global->setUnnamedAddr(llvm::GlobalValue::UnnamedAddr::Global);
    ir_.CreateIntrinsic(llvm::Intrinsic::x86_sttilecfg, {}, {at(b_.unit_state)});
    ld_tile_config(global);
  }
  /// Without a configuration of the caller's this loads zeros, the initial state: the system has no tiles to save.
  void leave() override { ld_tile_config(at(b_.unit_state)); }

  // ---- rearranging

  /// A row in pieces of a tile's row, the last one filled up with zeros: A tiles, those of a step's rows together.
  void rearrange_q(Value* rows) override {
    const std::int64_t whole = b_.d / kTileDepth, rest = b_.d % kTileDepth;
    const std::int64_t step_bytes = std::int64_t{b_.step_rows} * kTileRowBytes;
    Values none;
    loop(ir_, constant(0), rows, 1, none, [&](Value* row, Values&) {
      Value* from = q_row(row);
      Value* to = advance(ir_, q_of_step(row), times(ir_.CreateURem(row, constant(b_.step_rows)), kTileRowBytes));
      loop(ir_, constant(0), constant(whole), 1, none, [&](Value* i, Values&) {
        store(load(vector_of(ir_.getInt16Ty(), kTileDepth), advance(ir_, from, times(i, kTileRowBytes)), 2),
              advance(ir_, to, times(i, step_bytes)), kTileRowBytes);
      });
      auto* piece = vector_of(ir_.getInt16Ty(), kChunk);
      for (std::int64_t i = 0; rest != 0 && i < kTileDepth; i += kChunk) {
        Value* bits = i < rest ? load(piece, advance(ir_, from, (whole * kTileDepth + i) * 2), 2)
                               : llvm::Constant::getNullValue(piece);
        store(bits, advance(ir_, to, whole * step_bytes + i * 2), kChunk * 2);
      }
    });
  }

  /// B tiles [16 keys][D / 32]: dwords of 16 keys side by side.
  void rearrange_k(Value* k, Value* keys) override {
    const std::int64_t whole = b_.d / kTileDepth, rest = b_.d % kTileDepth / kChunk;
    Value* ahead = times(k_stride_, kKeysAhead);
    Values none;
    loop(ir_, constant(0), round_up_to(keys, b_.step_keys), kTileRows, none, [&](Value* key, Values&) {
      Value* to = advance(ir_, at(b_.k), times(key, depth_steps(b_.d) * kTileBytes / kTileRows));
      Values rows;
      for (int i = 0; i < kTileRows; ++i)
        rows.push_back(row_of(k, k_stride_, ir_.CreateAdd(key, constant(i)), keys));
      loop(ir_, constant(0), constant(whole), 1, none, [&](Value* step, Values&) {
        for (Value* row : rows)
          prefetch(advance(ir_, advance(ir_, row, ahead), times(step, kTileRowBytes)));
        transpose_step(rows, times(step, kTileRowBytes), advance(ir_, to, times(step, kTileBytes)),
                       kTileDepth / kChunk);
      });
      if (rest != 0)
        transpose_step(rows, constant(whole * kTileRowBytes), advance(ir_, to, whole * kTileBytes),
                       static_cast<int>(rest));
    });
  }

  /// A tile from `chunks` times 8 elements of 16 rows; what they do not fill is zeros. All loads come before all
  /// stores, whose addresses they may resemble (see MatrixBlocking::chunk_gap).
  void transpose_step(const Values& rows, Value* offset, Value* to, int chunks) {
    Values registers;
    for (int chunk = 0; chunk < chunks; ++chunk)
      for (int j = 0; j < kLanes; ++j) {
        Value* pieces[kLanes];
        for (int l = 0; l < kLanes; ++l)
          pieces[l] = load(
              vector_of(ir_.getInt32Ty(), 4),
              advance(ir_, advance(ir_, rows[static_cast<std::size_t>(kLanes * l + j)], offset), chunk * kChunk * 2),
              2);
        registers.push_back(concatenated(concatenated(pieces[0], pieces[1]), concatenated(pieces[2], pieces[3])));
      }
    for (int chunk = 0; chunk < chunks; ++chunk)
      transpose_lanes(&registers[static_cast<std::size_t>(chunk * kLanes)]);
    for (int i = 0; i < kTileRows; ++i)
      store(i < chunks * kLanes ? registers[static_cast<std::size_t>(i)]
                                : llvm::Constant::getNullValue(unit_.dwords(ir_)),
            advance(ir_, to, i * kTileRowBytes), kTileRowBytes);
  }

  /// Four registers, of which number j holds four dwords of row 4l + j in 128-bit lane l, to four of one dword of all
  /// rows: 4 × 4 dwords transposed within lanes.
  void transpose_lanes(Value** z) {
    const auto interleaved = [&](Value* a, Value* b, int elements, bool high) { // of each lane's halves
      llvm::SmallVector<int, 16> order;
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i) {
          const int source = i / elements % 2, element = i / (2 * elements) * elements + i % elements + (high ? 2 : 0);
          order.push_back(16 * source + 4 * lane + element);
        }
      return ir_.CreateShuffleVector(a, b, order);
    };
    Value* low[2] = {interleaved(z[0], z[1], 1, false), interleaved(z[2], z[3], 1, false)};
    Value* high[2] = {interleaved(z[0], z[1], 1, true), interleaved(z[2], z[3], 1, true)};
    z[0] = interleaved(low[0], low[1], 2, false);
    z[1] = interleaved(low[0], low[1], 2, true);
    z[2] = interleaved(high[0], high[1], 2, false);
    z[3] = interleaved(high[0], high[1], 2, true);
  }

  Value* concatenated(Value* a, Value* b) {
    llvm::SmallVector<int, 16> order;
    const int n = 2 * static_cast<int>(llvm::cast<llvm::FixedVectorType>(a->getType())->getNumElements());
    for (int i = 0; i < n; ++i)
      order.push_back(i);
    return ir_.CreateShuffleVector(a, b, order);
  }

  /// B tiles [Dv / 16][32 keys]: values of two keys side by side.
  void rearrange_v(Value* v, Value* keys) override {
    Values none;
    Value* even = times(divided(keys, 2), 2);
    const auto row = [&](Value* key) { return advance(ir_, v, ir_.CreateMul(key, v_stride_)); };
    const auto to = [&](Value* key) { return advance(ir_, at(b_.v), times(key, kTileRowBytes / 2)); };
    loop(ir_, constant(0), even, 2, none,
         [&](Value* key, Values&) { interleave_keys(row(key), row(ir_.CreateAdd(key, constant(1))), to(key)); });
    Value* padded = round_up_to(keys, b_.step_keys);
    when(ir_, ir_.CreateICmpSLT(even, keys), [&] { interleave_keys(row(even), nullptr, to(even)); });
    loop(ir_, round_up_to(keys, 2), padded, 2, none,
         [&](Value* key, Values&) { interleave_keys(nullptr, nullptr, to(key)); });
  }

  /// Rows of Dv values, null for zeros.
  void interleave_keys(Value* even, Value* odd, Value* to) {
    for (std::int64_t done = 0; done < b_.dv;) {
      const std::int64_t rest = b_.dv - done, count = rest >= 32 ? 32 : rest >= 16 ? 16 : 8;
      auto* type = vector_of(ir_.getInt16Ty(), count);
      const auto values = [&](Value* row) {
        return row == nullptr ? static_cast<Value*>(llvm::Constant::getNullValue(type))
                              : load(type, advance(ir_, row, done * 2), 2);
      };
      Value *a = values(even), *b = values(odd);
      if (count == 8) { // the rest of the tile is zeros
        a = concatenated(a, llvm::Constant::getNullValue(type));
        b = concatenated(b, llvm::Constant::getNullValue(type));
      }
      const int width = static_cast<int>(std::max<std::int64_t>(count, 16));
      for (int first = 0; first < width; first += 16) {
        llvm::SmallVector<int, 32> order;
        for (int i = first; i < first + 16; ++i)
          order.append({i, width + i});
        store(ir_.CreateShuffleVector(a, b, order), advance(ir_, to, (done + first) / unit_.lanes * b_.v_part_bytes()),
              kTileRowBytes);
      }
      done += count;
    }
  }

  // ---- products

  void score(const Step& step) override {
    Value* q = q_of_step(step.first);
    const std::int64_t group_bytes = depth_steps(b_.d) * kTileBytes; // of 16 keys
    for_row_tiles(step.rows, [&](int row_tiles) {
      Values none;
      loop(ir_, constant(0), step.padded, b_.step_keys, none, [&](Value* key, Values&) {
        Value* k = advance(ir_, at(b_.k), times(ir_.CreateAdd(step.begin, key), group_bytes / kTileRows));
        Value* scores = advance(ir_, at(b_.scores), times(divided(key, unit_.lanes), b_.chunk_bytes()));
        for_sums(row_tiles, 2, scores, [&](int tile, Value*) { zero_tile(tile); });
        loop(ir_, constant(0), constant(depth_steps(b_.d)), 1, none, [&](Value* i, Values&) {
          multiply_step(row_tiles, 2, advance(ir_, q, times(i, b_.step_rows * kTileRowBytes)),
                        advance(ir_, k, times(i, kTileBytes)), group_bytes);
        });
        for_sums(row_tiles, 2, scores, [&](int tile, Value* to) { store_tile(tile, to); });
      });
    });
  }

  void accumulate(const Step& step) override {
    Value* o = o_of_step(step.first);
    Value* v_of_step = advance(ir_, at(b_.v), times(divided(step.begin, b_.step_keys), b_.v_step_bytes));
    const std::int64_t parts = b_.v_parts;
    for_row_tiles(step.rows, [&](int row_tiles) {
      Values none;
      const auto columns_from = [&](Value* part, int columns) {
        Value* v = advance(ir_, v_of_step, times(part, b_.v_part_bytes()));
        Value* sums = advance(ir_, o, times(part, b_.chunk_bytes()));
        for_sums(row_tiles, columns, sums, [&](int tile, Value* from) { load_tile(tile, from); });
        loop(ir_, constant(0), step.padded, b_.step_keys, none, [&](Value* key, Values&) {
          Value* p = advance(ir_, at(b_.scores), times(divided(key, b_.step_keys), b_.chunk_bytes()));
          multiply_step(row_tiles, columns, p, advance(ir_, v, times(divided(key, b_.step_keys), b_.v_step_bytes)),
                        b_.v_part_bytes());
        });
        for_sums(row_tiles, columns, sums, [&](int tile, Value* to) { store_tile(tile, to); });
      };
      loop(ir_, constant(0), constant(parts / 2 * 2), 2, none, [&](Value* part, Values&) { columns_from(part, 2); });
      if (parts % 2 != 0)
        columns_from(constant(parts - 1), 1);
    });
  }

  Value* narrow(Value* first, Value* second) override {
    // The second operand gives the low half of the result.
    return ir_.CreateIntrinsic(llvm::Intrinsic::x86_avx512bf16_cvtne2ps2bf16_512, {}, {second, first});
  }

  llvm::Module& module_;
};

} // namespace

MatrixBlocking amx_blocking(const KernelDesc& desc, const Target& target) {
  const std::int64_t d = desc.value[attention::kD], dv = desc.value[attention::kDv];
  constexpr std::int64_t kBlockRows = 256, kKeys = 512, kScoreKeys = 256;
  MatrixBlocking b{};
  b.unit = DotUnit::of(target);
  b.row_lanes = 1;
  b.step_rows = 2 * kTileRows;
  b.step_keys = kTileDepth;
  b.value_step = kTileRows;
  b.block_rows = kBlockRows;
  b.chunk_gap = 64;
  b.tile = kKeys;
  b.score_keys = kScoreKeys;
  b.q_step_bytes = depth_steps(d) * 2 * kTileBytes;
  b.k_bytes = kKeys / kTileRows * depth_steps(d) * kTileBytes;
  b.v_parts = (dv + kTileRows - 1) / kTileRows;
  b.v_step_bytes = kTileBytes;
  b.unit_bytes = kTileRowBytes;
  b.lay_out(desc);
  return b;
}

void emit_amx_attention(llvm::Function* function, const KernelDesc& desc, const Target& target) {
  const MatrixBlocking blocking = amx_blocking(desc, target);
  AmxAttention(function, blocking).emit();
}

} // namespace kiln::generator
