#include "backends/llvm/generator/attention_matrix.h"

#include <algorithm>
#include <cfloat>

namespace kiln::generator {

using llvm::Value;

namespace {

/// How far a row's greatest score, in the exponent of 2, may be above what is subtracted from it.
constexpr double kSlack = 8;

} // namespace

void MatrixBlocking::lay_out(const KernelDesc& desc) {
  group = attention::group_of(desc);
  d = desc.value[attention::kD];
  dv = desc.value[attention::kDv];
  rows_differ = desc.value[attention::kCausal] != static_cast<std::int64_t>(attention::Causal::none);
  WorkspaceLayout workspace;
  const auto take = [&](std::int64_t size) { return workspace.take(size); };
  unit_state = take(unit_bytes);
  RowState::lay_out(workspace, block_rows);
  scores = take(score_bytes());
  q = take(block_rows / step_rows * q_step_bytes);
  o = take(block_rows / step_rows * o_step_bytes());
  k = take(k_bytes);
  v = take(v_parts * v_part_bytes());
  bytes = workspace.bytes();
}

attention::Plan MatrixBlocking::plan() const {
  return {.block_rows = block_rows, .workspace_bytes = bytes, .makes_partials = true};
}

void MatrixAttention::emit() {
  read_call();
  enter();
  Values none;
  loop(ir_, row_begin_, row_end_, b_.block_rows, none, [&](Value* row, Values&) {
    Value* rows = smaller(ir_.CreateSub(row_end_, row), constant(b_.block_rows));
    Value* last = ir_.CreateSub(ir_.CreateAdd(row, rows), constant(1));
    Value* padded_rows = round_up_to(rows, b_.step_rows);
    set_up_rows(row, last, padded_rows);
    rearrange_q(padded_rows);
    clear_state(padded_rows);
    // Later queries see no less than earlier ones.
    Value* seen_by_any = limit_of(last);
    loop(ir_, key_begin_, seen_by_any, b_.tile, none, [&](Value* key, Values&) {
      Value* keys = smaller(ir_.CreateSub(seen_by_any, key), constant(b_.tile));
      Value* v_of_tile = advance(ir_, v_, ir_.CreateMul(key, v_stride_));
      rearrange_k(advance(ir_, k_, ir_.CreateMul(key, k_stride_)), keys);
      rearrange_v(v_of_tile, keys);
      Tile tile{row, rows, key, keys, v_of_tile, nullptr};
      if (b_.rows_differ) {
        Values found{ir_.getFalse()};
        Value* is_masked = ir_.CreateICmpSGT(ir_.CreateAdd(key, keys), limit_of(row));
        loop(ir_, constant(0), ir_.CreateZExt(is_masked, ir_.getInt64Ty()), 1, found,
             [&](Value*, Values& now) { now[0] = take_out_non_finite(keys); });
        tile.has_taken_out = found[0];
      }
      take_steps(tile);
    });
    finish(row, rows);
  });
  leave();
  ir_.CreateRetVoid();
}

/// Steps outside, keys within: O and the scores of a step stay in the smallest caches.
void MatrixAttention::take_steps(const Tile& tile) {
  Values none;
  loop(ir_, constant(0), tile.rows, b_.step_rows, none, [&](Value* first, Values&) {
    Value* rows = smaller(ir_.CreateSub(tile.rows, first), constant(b_.step_rows));
    Value* first_row = ir_.CreateAdd(tile.row, first);
    Value* last_row = ir_.CreateSub(ir_.CreateAdd(first_row, rows), constant(1));
    Value* seen = smaller(ir_.CreateSub(limit_of(last_row), tile.key), tile.keys);
    loop(ir_, constant(0), seen, b_.score_keys, none, [&](Value* begin, Values&) {
      Value* keys = smaller(ir_.CreateSub(seen, begin), constant(b_.score_keys));
      const Step step{first, rows, first_row, begin, keys, round_up_to(keys, b_.step_keys)};
      score(step);
      soften(tile, step);
      accumulate(step);
      if (tile.has_taken_out != nullptr)
        when(ir_, tile.has_taken_out, [&] { add_non_finite(tile, step); });
    });
  });
}

void MatrixAttention::for_vectors(Value* first, Value* rows,
                                  llvm::function_ref<void(Value* vector, Value* state)> body) {
  Value* state = state_of(first);
  Value* vectors = divided(ir_.CreateAdd(rows, constant(b_.row_lanes - 1)), b_.row_lanes);
  Values none;
  loop(ir_, constant(0), vectors, 1, none,
       [&](Value* vector, Values&) { body(vector, ir_.CreateAdd(state, times(vector, b_.register_bytes()))); });
}

void MatrixAttention::clear_state(Value* rows) {
  Values none;
  for_vectors(constant(0), rows, [&](Value*, Value* state) {
    store_register(float_constant(-FLT_MAX), advance(ir_, at(b_.maxima), state));
    store_register(float_constant(0), advance(ir_, at(b_.sums), state));
  });
  loop(ir_, constant(0), times(divided(rows, b_.step_rows), b_.o_step_bytes()), b_.register_bytes(), none,
       [&](Value* i, Values&) { store_register(float_constant(0), advance(ir_, at(b_.o), i)); });
}

// ---------------------------------------------------------------- softmax

/// Scores to P, in place; maxima, sums; O times the factors.
void MatrixAttention::soften(const Tile& tile, const Step& step) {
  Value* key = ir_.CreateAdd(tile.key, step.begin);
  Value* padded = step.padded;
  Value* seen_by_all = limit_of(step.first_row);
  Value* is_masked = ir_.CreateICmpSGT(ir_.CreateAdd(key, padded), seen_by_all);
  Value* o = o_of_step(step.first);
  for_vectors(step.first, step.rows, [&](Value* vector, Value* state) {
    Value* offset = times(vector, b_.register_bytes());
    Value* row_scores = advance(ir_, at(b_.scores), offset);
    when(ir_, is_masked, [&] { mask_step(row_scores, advance(ir_, at(b_.limits), state), key, seen_by_all, padded); });

    // Any bound near the maximum serves as well: P is at most 2^kSlack then. So a new one is rare, most tiles need
    // nothing from other lanes, and the exponentials wait for no maximum.
    Value* maxima = advance(ir_, at(b_.maxima), state);
    Value* sums = advance(ir_, at(b_.sums), state);
    Value* old_max = load_register(maxima);
    Value* lane_scores = greatest(row_scores, padded);
    Value* lane_maxima = ir_.CreateFMul(lane_scores, scale_);
    when(ir_, any_of(ir_.CreateFCmpOGT(lane_maxima, ir_.CreateFAdd(old_max, float_constant(kSlack)))), [&] {
      Value* row_max = over_lanes_of_row(lane_maxima, [&](Value* a, Value* b) { return greater(ir_, a, b); });
      // Row by row: a row's bits must not depend on those that share its register.
      Value* exceeds = ir_.CreateFCmpOGT(row_max, ir_.CreateFAdd(old_max, float_constant(kSlack)));
      Value* max = ir_.CreateSelect(exceeds, row_max, old_max);
      Value* factor = exp2_of_score(ir_, unit_, ir_.CreateFSub(old_max, max));
      store_register(max, maxima);
      store_register(ir_.CreateFMul(load_register(sums), factor), sums);
      rescale(advance(ir_, o, offset), factor);
    });
    const Exponent exponent = exponent_of(row_scores, b_.chunk_bytes(), padded, lane_scores, load_register(maxima));
    Value* sum = exponentiate(row_scores, padded, exponent);
    store_register(ir_.CreateFAdd(load_register(sums), sum), sums);
  });
}

/// -infinity for the keys that a row does not see, of which all are behind seen_by_all.
void MatrixAttention::mask_step(Value* scores, Value* limits, Value* key, Value* seen_by_all, Value* padded) {
  const int per_row = b_.lanes_per_row();
  Value* begin = times(divided(larger(ir_.CreateSub(seen_by_all, key), constant(0)), per_row), per_row);
  mask(advance(ir_, scores, times(divided(begin, per_row), b_.chunk_bytes())), b_.chunk_bytes(), limits,
       ir_.CreateAdd(key, begin), begin, padded);
}

Value* MatrixAttention::greatest(Value* scores, Value* padded) {
  Value* nothing = llvm::ConstantFP::getInfinity(unit_.floats(ir_), true);
  Values carried{nothing, nothing, scores};
  loop(ir_, constant(0), padded, 2 * b_.lanes_per_row(), carried, [&](Value*, Values& now) {
    for (std::size_t i = 0; i < 2; ++i)
      now[i] =
          greater(ir_, load_register(advance(ir_, now[2], static_cast<std::int64_t>(i) * b_.chunk_bytes())), now[i]);
    now[2] = advance(ir_, now[2], 2 * b_.chunk_bytes());
  });
  return greater(ir_, carried[1], carried[0]);
}

/// P in place of the scores; their sums, lane by lane. Four registers at a time.
Value* MatrixAttention::exponentiate(Value* scores, Value* padded, const Exponent& exponent) {
  constexpr int kPairs = 2;
  const int pair_keys = 2 * b_.lanes_per_row();
  Values carried{float_constant(0), float_constant(0), scores, scores};
  const auto take_pairs = [&](int pairs, Values& now) {
    Values p;
    for (int i = 0; i < 2 * pairs; ++i)
      p.push_back(ir_.CreateIntrinsic(
          llvm::Intrinsic::fmuladd, {unit_.floats(ir_)},
          {load_register(advance(ir_, now[2], i * b_.chunk_bytes())), exponent.scale, exponent.offset}));
    exp2_of_scores(ir_, unit_, p);
    for (int pair = 0; pair < pairs; ++pair) {
      Value** two = &p[static_cast<std::size_t>(2 * pair)];
      for (std::size_t i = 0; i < 2; ++i)
        now[i] = ir_.CreateFAdd(now[i], two[i]);
      store(narrow(two[0], two[1]), advance(ir_, now[3], pair * b_.chunk_bytes()), b_.register_bytes());
    }
    now[2] = advance(ir_, now[2], 2 * pairs * b_.chunk_bytes());
    now[3] = advance(ir_, now[3], pairs * b_.chunk_bytes());
  };
  Value* whole = times(divided(padded, kPairs * pair_keys), kPairs * pair_keys);
  loop(ir_, constant(0), whole, kPairs * pair_keys, carried, [&](Value*, Values& now) { take_pairs(kPairs, now); });
  if (b_.step_keys % (kPairs * pair_keys) != 0)
    loop(ir_, whole, padded, pair_keys, carried, [&](Value*, Values& now) { take_pairs(1, now); });
  return ir_.CreateFAdd(carried[0], carried[1]);
}

void MatrixAttention::rescale(Value* o, Value* factor) {
  Values none;
  loop(ir_, constant(0), constant(b_.o_step_bytes()), b_.chunk_bytes(), none, [&](Value* i, Values&) {
    Value* at = advance(ir_, o, i);
    store_register(ir_.CreateFMul(load_register(at), factor), at);
  });
}

// ---------------------------------------------------------------- infinities and NaNs of V

/// Of bf16 bits, scalar or vector.
Value* MatrixAttention::is_finite(Value* bits) {
  Value* exponent = llvm::ConstantInt::get(bits->getType(), 0x7F80);
  return ir_.CreateICmpNE(ir_.CreateAnd(bits, exponent), exponent);
}

/// Zeros in place of the rearranged tile's values that are not finite; whether there were any.
Value* MatrixAttention::take_out_non_finite(Value* keys) {
  auto* type = vector_of(ir_.getInt16Ty(), 2 * unit_.lanes);
  Value* bytes = times(divided(round_up_to(keys, b_.step_keys), b_.step_keys), b_.v_step_bytes);
  Values found{llvm::Constant::getNullValue(type)};
  loop(ir_, constant(0), constant(b_.v_parts), 1, found, [&](Value* part, Values& outer) {
    Value* begin = advance(ir_, at(b_.v), times(part, b_.v_part_bytes()));
    loop(ir_, constant(0), bytes, b_.register_bytes(), outer, [&](Value* i, Values& now) {
      Value* here = advance(ir_, begin, i);
      Value* bits = load(type, here, b_.register_bytes());
      Value* fine = is_finite(bits);
      store(ir_.CreateSelect(fine, bits, llvm::Constant::getNullValue(type)), here, b_.register_bytes());
      now[0] = ir_.CreateOr(now[0], ir_.CreateSExt(ir_.CreateNot(fine), type));
    });
  });
  return ir_.CreateICmpNE(ir_.CreateOrReduce(found[0]), ir_.getInt16(0));
}

void MatrixAttention::add_non_finite(const Tile& tile, const Step& step) {
  const int per_row = b_.lanes_per_row();
  Value* o = o_of_step(step.first);
  Values none;
  const auto lane = [&](Value* r) { // byte offset of a row in a chunk of O, and in one of P
    return times(r, per_row * 4);
  };
  loop(ir_, constant(0), step.keys, 1, none, [&](Value* i, Values&) {
    Value* values = advance(ir_, tile.v, ir_.CreateMul(ir_.CreateAdd(step.begin, i), v_stride_));
    Value* p = advance(ir_, at(b_.scores), times(divided(i, 2 * per_row), b_.chunk_bytes()));
    p = advance(ir_, p, times(ir_.CreateURem(i, constant(2 * per_row)), 2));
    loop(ir_, constant(0), constant(b_.dv), 1, none, [&](Value* j, Values&) {
      Value* bits = load(ir_.getInt16Ty(), advance(ir_, values, times(j, 2)), 2);
      when(ir_, ir_.CreateNot(is_finite(bits)), [&] {
        const auto float_of = [&](Value* half) {
          return ir_.CreateBitCast(ir_.CreateShl(ir_.CreateZExt(half, ir_.getInt32Ty()), 16), ir_.getFloatTy());
        };
        Value* value = float_of(bits);
        Value* chunk = advance(ir_, o, times(divided(j, per_row), b_.chunk_bytes()));
        chunk = advance(ir_, chunk, times(ir_.CreateURem(j, constant(per_row)), 4));
        loop(ir_, constant(0), step.rows, 1, none, [&](Value* r, Values&) {
          Value* limit = limit_of(ir_.CreateAdd(step.first_row, r));
          when(ir_, ir_.CreateICmpSLT(ir_.CreateAdd(ir_.CreateAdd(tile.key, step.begin), i), limit), [&] {
            Value* to = advance(ir_, chunk, lane(r));
            Value* weight = float_of(load(ir_.getInt16Ty(), advance(ir_, p, lane(r)), 2));
            store(ir_.CreateFAdd(load(ir_.getFloatTy(), to, 4), ir_.CreateFMul(weight, value)), to, 4);
          });
        });
      });
    });
  });
}

// ---------------------------------------------------------------- the end of a block of rows

void MatrixAttention::finish(Value* first_row, Value* rows) {
  for_vectors(constant(0), rows, [&](Value*, Value* state) { finish_sums(state); });
  store_rows(
      first_row, rows, b_.dv,
      [&](Value* row) {
        Value* in_step = ir_.CreateURem(row, constant(b_.step_rows));
        return advance(ir_, o_of_step(row), times(in_step, b_.lanes_per_row() * 4));
      },
      [&](Value* from, Value* to, Value* factor) { store_row(from, to, factor); });
}

/// `count` sums of a row of O from `value` on, both multiples of lanes_per_row, or fewer than that.
Value* MatrixAttention::gather(Value* from, Value* value, std::int64_t count) {
  const std::int64_t per_row = b_.lanes_per_row(), piece = std::min(per_row, count);
  Value* chunk = advance(ir_, from, times(divided(value, per_row), b_.chunk_bytes()));
  Value* out = nullptr;
  for (std::int64_t done = 0; done < count; done += piece, chunk = advance(ir_, chunk, b_.chunk_bytes())) {
    Value* loaded = load(vector_of(ir_.getFloatTy(), piece), chunk, 4);
    if (out == nullptr) {
      out = loaded;
      continue;
    }
    llvm::SmallVector<int, 16> widened, merged;
    for (int i = 0; i < done + piece; ++i) {
      widened.push_back(i < piece ? i : -1);
      merged.push_back(i < done ? i : static_cast<int>(done + piece + i - done));
    }
    llvm::SmallVector<int, 16> longer;
    for (int i = 0; i < done + piece; ++i)
      longer.push_back(i < done ? i : -1);
    out =
        ir_.CreateShuffleVector(ir_.CreateShuffleVector(out, longer), ir_.CreateShuffleVector(loaded, widened), merged);
  }
  return out;
}

/// A row of O: bf16 of its product with `factor`, or as it is when that is null.
void MatrixAttention::store_row(Value* from, Value* to, Value* factor) {
  const std::int64_t step = std::max(b_.lanes_per_row(), 8), size = factor != nullptr ? 2 : 4;
  const auto store_values = [&](Value* value, std::int64_t count) {
    Value* sums = gather(from, value, count);
    if (factor != nullptr)
      sums = unit_.narrow(ir_, ir_.CreateFMul(sums, ir_.CreateVectorSplat(static_cast<unsigned>(count), factor)));
    store(sums, advance(ir_, to, times(value, size)), size);
  };
  const std::int64_t whole = b_.dv / step * step;
  Values none;
  loop(ir_, constant(0), constant(whole), step, none, [&](Value* i, Values&) { store_values(i, step); });
  if (whole < b_.dv)
    store_values(constant(whole), b_.dv - whole);
}

} // namespace kiln::generator
