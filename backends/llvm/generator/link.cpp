#include "backends/llvm/generator/link.h"

#include <algorithm>
#include <array>

#include <llvm/ADT/BitmaskEnum.h>
#include <llvm/ExecutionEngine/JITLink/JITLink.h>
#include <llvm/ExecutionEngine/JITLink/JITLinkMemoryManager.h>
#include <llvm/ExecutionEngine/JITLink/aarch64.h>
#include <llvm/ExecutionEngine/JITLink/x86_64.h>
#include <llvm/ExecutionEngine/Orc/Core.h>
#include <llvm/ExecutionEngine/Orc/ExecutorProcessControl.h>
#include <llvm/ExecutionEngine/Orc/ObjectLinkingLayer.h>

#include <fmt/format.h>

#include "backends/llvm/generator/codegen.h"

namespace kiln::generator {
namespace {

LLVM_ENABLE_BITMASK_ENUMS_IN_NAMESPACE();
namespace jitlink = llvm::jitlink;
namespace orc = llvm::orc;

/// Where ORC believes the image to lie. Any multiple of every alignment does: nothing in the image depends on it.
constexpr std::uint64_t kBase = 1u << 20;

/// Relocations that hold wherever the whole image is put.
bool is_position_independent(Arch arch, jitlink::Edge::Kind kind) {
  if (arch == Arch::x86_64) {
    using namespace jitlink::x86_64;
    constexpr std::array<jitlink::Edge::Kind, 6> kinds{Delta64,    Delta32,       NegDelta64,
                                                       NegDelta32, BranchPCRel32, PCRel32};
    return std::ranges::find(kinds, kind) != kinds.end();
  }
  using namespace jitlink::aarch64;
  constexpr std::array<jitlink::Edge::Kind, 9> kinds{Delta64,           Delta32,       NegDelta64,
                                                     NegDelta32,        Branch26PCRel, TestAndBranch14PCRel,
                                                     CondBranch19PCRel, LDRLiteral19,  ADRLiteral21};
  return std::ranges::find(kinds, kind) != kinds.end();
}

llvm::Error refuse(const std::string& what) {
  return llvm::createStringError("the kernel does not fit a flat image: " + what);
}

llvm::Error check_flat(Arch arch, jitlink::LinkGraph& graph) {
  for (const jitlink::Section& section : graph.sections())
    if (!section.empty() && (section.getMemProt() & orc::MemProt::Write) != orc::MemProt::None)
      return refuse(fmt::format("section {} is writable", section.getName().str()));
  if (const auto externals = graph.external_symbols(); !externals.empty())
    return refuse(fmt::format("it needs {}, which is outside", (*externals.begin())->getName().str()));
  for (const jitlink::Block* block : graph.blocks())
    for (const jitlink::Edge& edge : block->edges()) {
      if (!edge.isRelocation())
        continue;
      if (!edge.getTarget().isDefined())
        return refuse("it refers to an absolute address");
      if (!is_position_independent(arch, edge.getKind()))
        return refuse(fmt::format("relocation {} is not relative", graph.getEdgeKindName(edge.getKind())));
    }
  return llvm::Error::success();
}

/// Checks each graph after dead code is gone and before anything is placed.
class FlatChecker : public orc::ObjectLinkingLayer::Plugin {
public:
  explicit FlatChecker(Arch arch) : arch_(arch) {}
  void modifyPassConfig(orc::MaterializationResponsibility&, jitlink::LinkGraph&,
                        jitlink::PassConfiguration& config) override {
    config.PostPrunePasses.push_back([arch = arch_](jitlink::LinkGraph& graph) { return check_flat(arch, graph); });
  }
  llvm::Error notifyFailed(orc::MaterializationResponsibility&) override { return llvm::Error::success(); }
  llvm::Error notifyRemovingResources(orc::JITDylib&, orc::ResourceKey) override { return llvm::Error::success(); }
  void notifyTransferringResources(orc::JITDylib&, orc::ResourceKey, orc::ResourceKey) override {}

private:
  Arch arch_;
};

/// "Allocates" one graph in a buffer: segments follow each other as closely as their alignment allows, read-only before
/// executable.
class FlatMemory : public jitlink::JITLinkMemoryManager {
public:
  Bytes bytes;
  std::uint32_t alignment = 1;

  void allocate(const jitlink::JITLinkDylib*, jitlink::LinkGraph& graph, OnAllocatedFunction done) override {
    jitlink::BasicLayout layout(graph);
    std::uint64_t size = 0;
    for (auto& [group, segment] : layout.segments()) {
      size = llvm::alignTo(size, segment.Alignment);
      segment.Addr = orc::ExecutorAddr(kBase + size);
      size += segment.ContentSize + segment.ZeroFillSize;
      alignment = std::max(alignment, static_cast<std::uint32_t>(segment.Alignment.value()));
    }
    bytes.assign(size, 0);
    for (auto& [group, segment] : layout.segments())
      segment.WorkingMem = reinterpret_cast<char*>(bytes.data()) + (segment.Addr.getValue() - kBase);
    if (llvm::Error error = layout.apply())
      return done(std::move(error));
    done(std::make_unique<InFlight>());
  }
  void deallocate(std::vector<FinalizedAlloc> allocations, OnDeallocatedFunction done) override {
    for (FinalizedAlloc& allocation : allocations)
      allocation.release();
    done(llvm::Error::success());
  }

private:
  class InFlight : public InFlightAlloc {
    void abandon(OnAbandonedFunction done) override { done(llvm::Error::success()); }
    void finalize(OnFinalizedFunction done) override { done(FinalizedAlloc(orc::ExecutorAddr(kBase))); }
  };
};

} // namespace

Result<FlatImage> link_flat(Arch arch, std::unique_ptr<llvm::MemoryBuffer> object, const std::string& entry) {
  // A session without an executor: nothing runs here, so that one route links for every architecture, the host's own
  // included.
  auto executor = std::make_unique<orc::UnsupportedExecutorProcessControl>(
      nullptr, std::make_unique<orc::InPlaceTaskDispatcher>(), triple_of(arch), 4096);
  orc::ExecutionSession session(std::move(executor));
  std::string reported;
  session.setErrorReporter(
      [&](llvm::Error error) { reported += (reported.empty() ? "" : "; ") + llvm::toString(std::move(error)); });
  FlatMemory memory;
  FlatImage image;
  std::string failure;
  {
    orc::ObjectLinkingLayer layer(session, memory);
    layer.addPlugin(std::make_shared<FlatChecker>(arch));
    orc::JITDylib& kernel = session.createBareJITDylib("kernel");
    if (llvm::Error error = layer.add(kernel, std::move(object))) {
      failure = llvm::toString(std::move(error));
    } else if (auto symbol =
                   session.lookup(orc::makeJITDylibSearchOrder(&kernel, orc::JITDylibLookupFlags::MatchAllSymbols),
                                  session.intern(entry))) {
      image.entry = symbol->getAddress().getValue() - kBase;
    } else {
      failure = llvm::toString(symbol.takeError());
    }
    if (llvm::Error error = session.endSession())
      failure += llvm::toString(std::move(error));
  }
  if (!failure.empty())
    return Status::error(Code::compile_failed, reported.empty() ? failure : reported);
  image.bytes = std::move(memory.bytes);
  image.alignment = memory.alignment;
  return image;
}

} // namespace kiln::generator
