#include "backends/llvm/generator/int8_mm.h"

#include <algorithm>
#include <cstddef>
#include <optional>

#include <llvm/IR/IntrinsicsX86.h>
#include <llvm/IR/Module.h>

#include "backends/llvm/generator/epilogue.h"
#include "backends/llvm/generator/ir.h"
#include "backends/llvm/generator/quantise.h"
#include "backends/llvm/int8_mm_layout.h"

namespace kiln::generator {
namespace {

using int8_mm::Call;
using llvm::Value;

constexpr std::int64_t kCacheLine = 64;
/// Of widened rows of A that one sweep over the panels of B keeps: a share of a small L2.
constexpr std::int64_t kRowBlockBytes = 256 << 10;
constexpr std::int64_t kMaxTilesInRowBlock = 8;

/// The registers that a tile of C may use. The rest hold B, A's broadcast and a product.
struct VectorUnit {
  int lanes;        ///< s32 in a register
  int max_rows;     ///< of a tile
  int accumulators; ///< registers of sums
};

VectorUnit vector_unit(const Target& target) {
  if (target.arch == Arch::aarch64)
    return {.lanes = 4, .max_rows = 4, .accumulators = 16};
  if (target.features.has(Feature::avx512bw))
    return {.lanes = 16, .max_rows = 6, .accumulators = 24};
  if (target.features.has(Feature::avx2))
    return {.lanes = 8, .max_rows = 6, .accumulators = 12};
  return {.lanes = 4, .max_rows = 2, .accumulators = 8};
}

/// The tile shape and everything that follows from it: written once, for the code and for its launch plan.
struct Blocking {
  int8_mm::PackLayout layout;
  int lanes;
  int vectors;             ///< registers of sums for one row and panel
  int rows;                ///< of a tile
  int panels;              ///< of a tile
  int k_step;              ///< k in one iteration of the innermost loop
  bool exact_m;            ///< m is known, and `rows` divides it
  std::int64_t row_stride; ///< bytes between widened rows of A
  std::int64_t block_rows; ///< rows of A widened at a time
};

Blocking blocking_of(const KernelDesc& desc, const Target& target) {
  const std::int64_t m = desc.value[int8_mm::kM], k = desc.value[int8_mm::kK];
  const VectorUnit unit = vector_unit(target);
  Blocking b{};
  b.layout = portable::int8_mm_layout(target.arch);
  b.lanes = unit.lanes;
  b.vectors = b.layout.n_block / unit.lanes;
  // Classes of m are powers of two, which tiles of 4 rows cover best.
  b.rows = m == kAny ? unit.max_rows : static_cast<int>(std::clamp<std::int64_t>(m, 1, std::min(4, unit.max_rows)));
  b.panels = std::clamp(unit.accumulators / (b.rows * b.vectors), 1, 4);
  b.k_step = target.arch == Arch::aarch64 ? 8 : 4;
  const MRange range = int8_mm::op().m_range(desc);
  b.exact_m = std::max<std::int64_t>(range.min, 1) == range.max && m % b.rows == 0;
  // One line more than needed, so that the rows of a tile do not fall into the same cache sets.
  b.row_stride = (2 * k + 2 * b.k_step + kCacheLine - 1) / kCacheLine * kCacheLine + kCacheLine;
  std::int64_t tiles = std::clamp<std::int64_t>(kRowBlockBytes / (b.row_stride * b.rows), 1, kMaxTilesInRowBlock);
  if (m != kAny)
    tiles = std::min(tiles, (m + b.rows - 1) / b.rows);
  b.block_rows = std::max<std::int64_t>(tiles, 1) * b.rows;
  return b;
}

/// Writes the kernel:
///
///   for each block of rows:              widened to s16 in the workspace
///     for each group of panels of B:     stays in L1 while the block's tiles pass
///       for each tile of rows:           sums in registers
///         for k
class Int8Mm {
public:
  Int8Mm(llvm::Function* function, const KernelDesc& desc, const Target& target)
      : ir_(function->getContext()), call_(function->getArg(0)), block_(blocking_of(desc, target)),
        n_(desc.value[int8_mm::kN]), k_(desc.value[int8_mm::kK]), epilogue_(int8_mm::Epilogue::of(desc)),
        terms_panel_bytes_(int8_mm::TermsLayout::of(epilogue_).panel_bytes(block_.layout)),
        c_bytes_(epilogue_.c_bytes()), row_ends_with_value_(epilogue_.a_zp == int8_mm::AZp::row) {
    ir_.SetInsertPoint(llvm::BasicBlock::Create(ir_.getContext(), "entry", function));
    if (!epilogue_.is_absent())
      writer_.emplace(ir_, epilogue_, target, block_.lanes, call_);
  }

  /// int8_linear, whose Call begins with an int8_mm's.
  struct Linear {};
  Int8Mm(llvm::Function* function, const KernelDesc& desc, const Target& target, Linear)
      : ir_(function->getContext()), call_(function->getArg(0)),
        block_(blocking_of(int8_linear::product_desc(desc), target)), n_(desc.value[int8_linear::kN]),
        k_(desc.value[int8_linear::kK]),
        terms_panel_bytes_(std::int64_t{4} * int8_linear::TermsLayout::count(desc) * block_.layout.n_block),
        c_bytes_(static_cast<int>(int8_linear::bytes_of(int8_linear::y_of(desc)))), row_ends_with_value_(true) {
    static_assert(offsetof(int8_linear::Call, product) == 0);
    ir_.SetInsertPoint(llvm::BasicBlock::Create(ir_.getContext(), "entry", function));
    writer_.emplace(ir_, desc, target, block_.lanes);
  }

  void emit_linear(int8_linear::Float x_type) {
    load_arguments();
    Value* const steps = field<std::uint64_t>(offsetof(int8_linear::Call, steps));
    const auto when_asked = [&](int8_linear::Step step, llvm::function_ref<void()> body) {
      when(ir_, ir_.CreateIsNotNull(ir_.CreateAnd(steps, step)), body);
    };
    when_asked(int8_linear::kQuantise, [&] {
      Values cursors{field<void*>(offsetof(int8_linear::Call, x)), workspace_};
      Value* const x_step = ir_.CreateMul(field<std::int64_t>(offsetof(int8_linear::Call, ldx)),
                                          ir_.getInt64(static_cast<std::uint64_t>(int8_linear::bytes_of(x_type))));
      loop(ir_, ir_.getInt64(0), m_, 1, cursors, [&](Value*, Values& at) {
        quantise_row(ir_, x_type, k_, block_.lanes, at[0], at[1], advance(ir_, at[1], row_zp_at()));
        at[0] = advance(ir_, at[0], x_step);
        at[1] = advance(ir_, at[1], block_.row_stride);
      });
    });
    when_asked(int8_linear::kMultiply, [&] {
      Value* c_block_step = ir_.CreateMul(c_stride_, ir_.getInt64(block_.block_rows));
      Values cursors{workspace_, field<void*>(offsetof(Call, c))};
      loop(ir_, ir_.getInt64(0), m_, block_.block_rows, cursors, [&](Value* row, Values& at) {
        workspace_ = at[0];
        multiply_panels(at[1], rows_of_block(row));
        at[0] = advance(ir_, at[0], block_.block_rows * block_.row_stride);
        at[1] = advance(ir_, at[1], c_block_step);
      });
    });
    ir_.CreateRetVoid();
  }

  void emit() {
    load_arguments();
    lda_ = field<std::int64_t>(offsetof(Call, lda));
    Value* a_block_step = ir_.CreateMul(lda_, ir_.getInt64(block_.block_rows));
    Value* c_block_step = ir_.CreateMul(c_stride_, ir_.getInt64(block_.block_rows));

    Values cursors{field<void*>(offsetof(Call, a)), field<void*>(offsetof(Call, c))};
    if (has_row_zp())
      cursors.push_back(field<void*>(offsetof(Call, a_zp)));
    loop(ir_, ir_.getInt64(0), m_, block_.block_rows, cursors, [&](Value* row, Values& at) {
      Value* rows = rows_of_block(row);
      widen_rows(at[0], rows, has_row_zp() ? at[2] : nullptr);
      multiply_panels(at[1], rows);
      if (has_row_zp())
        at[2] = advance(ir_, at[2], 4 * block_.block_rows);
      at[0] = advance(ir_, at[0], a_block_step);
      at[1] = advance(ir_, at[1], c_block_step);
    });
    ir_.CreateRetVoid();
  }

private:
  void load_arguments() {
    m_ = field<std::int64_t>(offsetof(Call, m));
    columns_ = field<std::int64_t>(offsetof(Call, n));
    c_stride_ = ir_.CreateShl(field<std::int64_t>(offsetof(Call, ldc)), llvm::Log2_32(static_cast<unsigned>(c_bytes_)));
    terms_ = writer_ ? field<void*>(offsetof(Call, terms)) : nullptr;
    b_ = field<void*>(offsetof(Call, b));
    workspace_ = field<void*>(offsetof(Call, workspace));
    c_tile_step_ = ir_.CreateMul(c_stride_, ir_.getInt64(block_.rows));
  }

  /// Rows of the block that begins at `row`.
  Value* rows_of_block(Value* row) {
    Value* left = ir_.CreateSub(m_, row);
    return ir_.CreateSelect(ir_.CreateICmpSLT(left, ir_.getInt64(block_.block_rows)), left,
                            ir_.getInt64(block_.block_rows));
  }

  template <class T> Value* field(std::size_t offset) {
    llvm::Type* type = std::is_pointer_v<T> ? static_cast<llvm::Type*>(ir_.getPtrTy()) : ir_.getInt64Ty();
    return ir_.CreateLoad(type, advance(ir_, call_, static_cast<std::int64_t>(offset)));
  }
  llvm::FixedVectorType* vector_of(int bits, int count) {
    return llvm::FixedVectorType::get(ir_.getIntNTy(bits), count);
  }
  Value* load(llvm::Type* type, Value* base, std::int64_t offset, int alignment) {
    return ir_.CreateAlignedLoad(type, advance(ir_, base, offset), llvm::Align(alignment));
  }

  bool has_row_zp() const { return epilogue_.a_zp == int8_mm::AZp::row; }
  // Where a row's values lie in the workspace, behind what the products read.
  std::int64_t row_sum_at() const { return block_.row_stride - 4; }
  std::int64_t row_zp_at() const { return block_.row_stride - 8; }

  /// Rows of A as s16 in the workspace, and their values for the epilogue. What lies beyond K there stays as it was: it
  /// meets the pack's zeros.
  void widen_rows(Value* a, Value* rows, Value* a_zp) {
    Values cursors{a, workspace_};
    if (a_zp != nullptr)
      cursors.push_back(a_zp);
    loop(ir_, ir_.getInt64(0), rows, 1, cursors, [&](Value*, Values& at) {
      constexpr int kChunk = 32;
      const std::int64_t whole = k_ / kChunk * kChunk;
      Values sums;
      if (epilogue_.needs_row_sums())
        sums.push_back(llvm::Constant::getNullValue(vector_of(32, kChunk)));
      loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), kChunk, sums, [&](Value* k, Values& so_far) {
        Value* wide = widen(advance(ir_, at[0], k), advance(ir_, at[1], ir_.CreateShl(k, 1)), kChunk);
        if (!so_far.empty())
          so_far[0] = ir_.CreateAdd(so_far[0], ir_.CreateSExt(wide, vector_of(32, kChunk)));
      });
      Value* sum = sums.empty() ? nullptr : ir_.CreateAddReduce(sums[0]);
      std::int64_t k = whole;
      for (int piece = kChunk / 2; piece > 0; piece /= 2)
        if ((k_ - whole) & piece) {
          Value* wide = widen(advance(ir_, at[0], k), advance(ir_, at[1], 2 * k), piece);
          if (sum != nullptr)
            sum = ir_.CreateAdd(sum, ir_.CreateAddReduce(ir_.CreateSExt(wide, vector_of(32, piece))));
          k += piece;
        }
      if (sum != nullptr)
        ir_.CreateAlignedStore(sum, advance(ir_, at[1], row_sum_at()), llvm::Align(4));
      if (a_zp != nullptr) {
        ir_.CreateAlignedStore(load(ir_.getInt32Ty(), at[2], 0, 4), advance(ir_, at[1], row_zp_at()), llvm::Align(4));
        at[2] = advance(ir_, at[2], 4);
      }
      at[0] = advance(ir_, at[0], lda_);
      at[1] = advance(ir_, at[1], block_.row_stride);
    });
  }

  Value* widen(Value* from, Value* to, int count) {
    Value* narrow = ir_.CreateAlignedLoad(vector_of(8, count), from, llvm::Align(1));
    const bool is_u8 = epilogue_.a_dtype == int8_mm::ADtype::u8;
    Value* wide = is_u8 ? ir_.CreateZExt(narrow, vector_of(16, count)) : ir_.CreateSExt(narrow, vector_of(16, count));
    ir_.CreateAlignedStore(wide, to, llvm::Align(2));
    return wide;
  }

  /// All columns of a block of rows: groups of panels, then single panels, then the columns that end N inside a panel.
  void multiply_panels(Value* c, Value* rows) {
    const std::int64_t n_block = block_.layout.n_block, panel_bytes = block_.layout.panel_bytes(k_);
    Value* full = ir_.CreateLShr(columns_, ir_.getInt64(llvm::Log2_64(n_block)));
    Value* done = ir_.getInt64(0);
    Values cursors{b_, c};
    if (writer_)
      cursors.push_back(terms_);
    for (int panels = block_.panels; panels >= 1; panels = panels > 1 ? 1 : 0) {
      if (n_ / n_block < panels)
        continue;
      Value* end = panels == 1 ? full : ir_.CreateSub(full, ir_.CreateURem(full, ir_.getInt64(panels)));
      loop(ir_, done, end, panels, cursors, [&](Value*, Values& at) {
        multiply_tiles(at[0], at[1], writer_ ? at[2] : nullptr, rows, panels, n_block);
        at[0] = advance(ir_, at[0], panels * panel_bytes);
        at[1] = advance(ir_, at[1], panels * n_block * c_bytes_);
        if (writer_)
          at[2] = advance(ir_, at[2], panels * terms_panel_bytes_);
      });
      done = end;
    }
    if (const std::int64_t rest = n_ % n_block)
      when(ir_, ir_.CreateIsNotNull(ir_.CreateAnd(columns_, n_block - 1)),
           [&] { multiply_tiles(cursors[0], cursors[1], writer_ ? cursors[2] : nullptr, rows, 1, rest); });
  }

  void multiply_tiles(Value* b, Value* c, Value* terms, Value* rows, int panels, std::int64_t columns_of_last) {
    tile_columns_.clear();
    if (writer_)
      for (int panel = 0; panel < panels; ++panel)
        for (int i = 0; i < block_.vectors; ++i)
          tile_columns_.push_back(writer_->load_columns(terms,
                                                        panel * terms_panel_bytes_ + std::int64_t{4} * i * block_.lanes,
                                                        std::int64_t{4} * block_.layout.n_block));
    Values cursors{workspace_, c};
    loop(ir_, ir_.getInt64(0), rows, block_.rows, cursors, [&](Value* row, Values& at) {
      const Values sums = multiply(at[0], b, panels);
      store(sums, at[0], at[1], ir_.CreateSub(rows, row), panels, columns_of_last);
      at[0] = advance(ir_, at[0], block_.rows * block_.row_stride);
      at[1] = advance(ir_, at[1], c_tile_step_);
    });
  }

  /// sums[(row · panels + panel) · vectors + vector]
  Values multiply(Value* a, Value* b, int panels) {
    Values sums(static_cast<std::size_t>(block_.rows * panels * block_.vectors),
                llvm::Constant::getNullValue(vector_of(32, block_.lanes)));
    const std::int64_t whole = k_ / block_.k_step * block_.k_step;
    loop(ir_, ir_.getInt64(0), ir_.getInt64(whole), block_.k_step, sums, [&](Value* k, Values& at) {
      multiply_step(advance(ir_, a, ir_.CreateShl(k, 1)),
                    advance(ir_, b, ir_.CreateMul(k, ir_.getInt64(block_.layout.n_block))), panels, block_.k_step, at);
    });
    const std::int64_t rest = block_.layout.k_padded(k_) - whole;
    multiply_step(advance(ir_, a, 2 * whole), advance(ir_, b, whole * block_.layout.n_block), panels,
                  static_cast<int>(rest), sums);
    return sums;
  }

  /// `k_count` steps along k, a multiple of the pack's k_block.
  void multiply_step(Value* a, Value* b, int panels, int k_count, Values& sums) {
    const int k_block = block_.layout.k_block;
    for (int k = 0; k < k_count; k += k_block) {
      Values columns;
      for (int panel = 0; panel < panels; ++panel)
        load_columns(b, panel * block_.layout.panel_bytes(k_) + k * block_.layout.n_block, columns);
      for (int row = 0; row < block_.rows; ++row) {
        Value* multiplier = k_block == 2 ? broadcast_pair(a, row * block_.row_stride + 2 * k)
                                         : broadcast_lane(a, row * block_.row_stride, k);
        for (std::size_t i = 0; i < columns.size(); ++i) {
          Value*& sum = sums[static_cast<std::size_t>(row) * columns.size() + i];
          sum = ir_.CreateAdd(sum, product(columns[i], multiplier));
        }
      }
    }
  }

  /// One panel's columns for one k_block, widened to s16, a register's worth each.
  void load_columns(Value* b, std::int64_t offset, Values& columns) {
    const int k_block = block_.layout.k_block, width = block_.lanes * k_block;
    if (k_block == 2) {
      for (int i = 0; i < block_.vectors; ++i)
        columns.push_back(
            ir_.CreateSExt(load(vector_of(8, width), b, offset + i * width, width), vector_of(16, width)));
      return;
    }
    // Four bytes are no register: load the panel's 16, and let smlal and smlal2 take the halves.
    Value* wide = ir_.CreateSExt(load(vector_of(8, 16), b, offset, 16), vector_of(16, 16));
    for (int i = 0; i < block_.vectors; ++i)
      columns.push_back(ir_.CreateShuffleVector(wide, lanes_from(i * width, width)));
  }

  static llvm::SmallVector<int, 16> lanes_from(int first, int count) {
    llvm::SmallVector<int, 16> lanes;
    for (int i = 0; i < count; ++i)
      lanes.push_back(first + i);
    return lanes;
  }

  /// a[k], a[k+1] of one row in every pair of lanes.
  Value* broadcast_pair(Value* a, std::int64_t offset) {
    Value* pair = load(ir_.getInt32Ty(), a, offset, 4);
    return ir_.CreateBitCast(ir_.CreateVectorSplat(static_cast<unsigned>(block_.lanes), pair),
                             vector_of(16, 2 * block_.lanes));
  }

  /// a[k] of one row in every lane, out of the eight loaded for one k_step: smlal can take its multiplier from a lane.
  Value* broadcast_lane(Value* a, std::int64_t offset, int k) {
    Value* eight = load(vector_of(16, 8), a, offset, 16);
    return ir_.CreateShuffleVector(eight, llvm::SmallVector<int, 16>(static_cast<std::size_t>(block_.lanes), k));
  }

  /// Exact: a product of s8 values is at most 2^14, a sum of two at most 2^15.
  Value* product(Value* columns, Value* multiplier) {
    if (block_.layout.k_block == 2) {
      const llvm::Intrinsic::ID pmaddwd = block_.lanes == 16  ? llvm::Intrinsic::x86_avx512_pmaddw_d_512
                                          : block_.lanes == 8 ? llvm::Intrinsic::x86_avx2_pmadd_wd
                                                              : llvm::Intrinsic::x86_sse2_pmadd_wd;
      return ir_.CreateIntrinsic(pmaddwd, {}, {columns, multiplier});
    }
    llvm::Type* wide = vector_of(32, block_.lanes);
    return ir_.CreateNSWMul(ir_.CreateSExt(columns, wide), ir_.CreateSExt(multiplier, wide));
  }

  /// The rows of the tile that exist; `columns_of_last` of the last panel's columns.
  void store(const Values& sums, Value* a, Value* c, Value* rows_left, int panels, std::int64_t columns_of_last) {
    llvm::Function* function = ir_.GetInsertBlock()->getParent();
    auto* stored = llvm::BasicBlock::Create(ir_.getContext(), "stored", function);
    const std::size_t vectors = static_cast<std::size_t>(panels * block_.vectors);
    const std::int64_t columns = (panels - 1) * block_.layout.n_block + columns_of_last;
    for (int row = 0; row < block_.rows; ++row) {
      if (row > 0) {
        c = advance(ir_, c, c_stride_);
        if (!block_.exact_m) {
          auto* next = llvm::BasicBlock::Create(ir_.getContext(), "row", function);
          ir_.CreateCondBr(ir_.CreateICmpSGT(rows_left, ir_.getInt64(row)), next, stored);
          ir_.SetInsertPoint(next);
        }
      }
      const auto of_row = [&](bool present, std::int64_t at) -> Value* {
        return present ? load(ir_.getInt32Ty(), a, row * block_.row_stride + at, 4) : nullptr;
      };
      Value* const a_zp = of_row(row_ends_with_value_, row_zp_at());
      Value* const row_sum = of_row(epilogue_.needs_row_sums(), row_sum_at());
      for (std::size_t i = 0; i < vectors; ++i) {
        Value* const sum = sums[static_cast<std::size_t>(row) * vectors + i];
        store_vector(writer_ ? writer_->finish(sum, tile_columns_[i], a_zp, row_sum) : sum, c,
                     static_cast<std::int64_t>(i) * block_.lanes, columns);
      }
    }
    ir_.CreateBr(stored);
    ir_.SetInsertPoint(stored);
  }

  /// Columns [first, first + lanes) of C, as far as they are below `columns`.
  void store_vector(Value* sums, Value* c, std::int64_t first, std::int64_t columns) {
    const int count = static_cast<int>(std::clamp<std::int64_t>(columns - first, 0, block_.lanes));
    int from = 0;
    for (int piece = block_.lanes; piece > 0; piece /= 2) {
      if (!(count & piece))
        continue;
      Value* part = piece == block_.lanes ? sums : ir_.CreateShuffleVector(sums, lanes_from(from, piece));
      ir_.CreateAlignedStore(part, advance(ir_, c, (first + from) * c_bytes_),
                             llvm::Align(static_cast<std::uint64_t>(c_bytes_)));
      from += piece;
    }
  }

  llvm::IRBuilder<> ir_;
  Value* call_;
  const Blocking block_;
  const std::int64_t n_, k_;
  const int8_mm::Epilogue epilogue_; ///< of int8_mm
  const std::int64_t terms_panel_bytes_;
  const int c_bytes_;
  const bool row_ends_with_value_;       ///< row_zp_at: a_zp, or int8_linear's s
  std::optional<EpilogueWriter> writer_; ///< with an epilogue
  Value* terms_ = nullptr;
  std::vector<EpilogueWriter::Columns> tile_columns_; ///< of the tile's vectors
  Value *m_ = nullptr, *columns_ = nullptr, *lda_ = nullptr, *b_ = nullptr, *workspace_ = nullptr;
  Value *c_stride_ = nullptr, *c_tile_step_ = nullptr; ///< bytes
};

llvm::Function* make_function(llvm::Module& module, const char* name) {
  llvm::LLVMContext& context = module.getContext();
  auto* type = llvm::FunctionType::get(llvm::Type::getVoidTy(context), {llvm::PointerType::getUnqual(context)}, false);
  return llvm::Function::Create(type, llvm::GlobalValue::ExternalLinkage, name, module);
}

} // namespace

llvm::Function* emit_int8_mm(llvm::Module& module, const KernelDesc& desc, const Target& target) {
  llvm::Function* function = make_function(module, "int8_mm");
  Int8Mm(function, desc, target).emit();
  return function;
}

int8_mm::Plan int8_mm_plan(const KernelDesc& desc, const Target& target) {
  const Blocking block = blocking_of(desc, target);
  return {.layout = block.layout,
          .m_step = block.rows,
          .n_step = block.layout.n_block,
          .workspace_fixed = block.block_rows * block.row_stride};
}

llvm::Function* emit_int8_linear(llvm::Module& module, const KernelDesc& desc, const Target& target) {
  llvm::Function* function = make_function(module, "int8_linear");
  Int8Mm(function, desc, target, Int8Mm::Linear()).emit_linear(int8_linear::x_of(desc));
  return function;
}

int8_linear::Plan int8_linear_plan(const KernelDesc& desc, const Target& target) {
  const Blocking block = blocking_of(int8_linear::product_desc(desc), target);
  return {.layout = block.layout,
          .m_step = block.rows,
          .n_step = block.layout.n_block,
          .q_row_bytes = block.row_stride,
          .q_end_bytes = (block.rows - 1) * block.row_stride, // of a tile that m ends in
          .terms = true};
}

} // namespace kiln::generator
