#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache/log.h"
#include "cache/remote_cache.h"
#include "cache/status.h"
#include "cache/store.h"
#include "cache/system_cache.h"
#include "jit/config.h"
#include "jit/implementation.h"
#include "jit/kernel.h"

namespace kiln {

struct EngineOptions {
  Config config;
  Machine machine;
  std::span<const Implementation> implementations; ///< in order of preference; must outlive the engine and its kernels
  Log::Sink log_sink = nullptr;                    ///< null: stderr
  void* log_context = nullptr;
  ParallelForFn parallel_for = nullptr; ///< null: pthreadpool
  void* parallel_context = nullptr;
  std::size_t max_code_bytes = 64u << 20; ///< L1's bound on loaded code; kernels that are held do not go
  /// How long a process waits for another that compiles the same kernel, before it compiles it for itself. Less than
  /// its threads wait for each other (2 s).
  std::chrono::milliseconds turn_patience{800};
  /// Listing of a code object for KILN_DUMP_DIR; may be null.
  std::function<Result<std::string>(const CodeObject&)> disassemble;
  std::string cuda_library = "libcuda.so.1"; ///< as for dlopen; tests name a driver of their own
  /// GPUs get the kernels of this SM, which theirs is to run too: to see what an older one computes. PTX is still
  /// assembled for the GPU that is there, so the configuration must have the cache off.
  std::optional<Target> gpu_target;
};

struct EngineStats {
  std::uint64_t memory_hits = 0, disk_hits = 0, compiled = 0, failed = 0, fallbacks = 0;
  std::uint64_t system_hits = 0;    ///< of the disk hits those in the system cache
  std::uint64_t system_refused = 0; ///< kernels there that failed authentication
  std::uint64_t remote_hits = 0;    ///< kernels loaded from the remote tier
  std::uint64_t remote_refused = 0; ///< rows there that are not trusted, or not what they say
  std::uint64_t remote_errors = 0;  ///< calls there that failed
  std::uint64_t kernels = 0, evictions = 0, code_bytes = 0;
  std::uint64_t compile_us = 0; ///< sum
  StoreStats store;             ///< its sizes are 0 where there is no database that can be read
};

/// Why each implementation of the op was taken or refused, and where its kernel would come from.
struct Explanation {
  struct Candidate {
    const Implementation* implementation = nullptr;
    bool taken = false;
    std::string reason; ///< empty when taken
  };
  KernelDesc canonical;
  MRange m_range;
  std::vector<Candidate> candidates; ///< every row of the op, in order
  /// ISA paths of the target's architecture and of the device that other ops are implemented on and this one is not.
  std::vector<IsaPath> without_implementation;
  const Implementation* taken = nullptr;
  Digest key;
  std::string key_text;    ///< what the key is the digest of, readable
  std::string pack_layout; ///< empty for ops without a pack
  std::string assumes;     ///< what the path taken takes for granted about the machine; may be empty
  /// Of a path with several: CodeObject::configuration, and the device whose timing chose it; empty: the path itself.
  std::string configuration, tuned_for;
  std::string tier; ///< `memory`, `disk`, `system`, `remote` or `none` (a get would compile)
  /// On a miss, each may be empty: the stored kernel of this op that differs least, and in which key fields;
  std::string nearest;
  /// and why a hit that was expected is none: a toggle, a row that is there and refused, or was there and what became
  /// of it, or the key fields in which a stored kernel of the very desc differs, with what they are there and here.
  std::string why;
};

/// The whole path of a call: L1, L2, the remote tier, compile. Thread-safe.
class Engine {
public:
  static Result<std::unique_ptr<Engine>> create(EngineOptions options);
  /// Waits for the background compile in progress, drops the rest, writes pending hit counts. Kernels that are held
  /// stay valid.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// The kernel for this desc. No lock and no allocation on a hit in memory.
  Result<KernelRef> get(const KernelDesc& desc);
  /// Likewise, for a caller whose stream may be capturing into a CUDA graph: where it is, and the kernel is not loaded,
  /// Code::busy instead of loading or compiling. The desc is one for a GPU; `stream` is its CUstream.
  Result<KernelRef> get_for_stream(const KernelDesc& desc, void* stream);

  /// What a desc's kernels are made for here: this machine, or the GPU that the desc names. Opens the NVIDIA driver for
  /// the latter.
  Result<Target> target_of(const KernelDesc& desc) const;

  enum class Warmed : std::uint8_t { hit, compiled };
  /// Makes sure that the cache on disk, or the system's, holds the desc's kernel for `target` (null: this machine), and
  /// with a signing key the remote tier too, whose failures are logged only. Loads nothing.
  Result<Warmed> warmup(const KernelDesc& desc, const Target* target);

  /// Times the configurations that the desc's path offers, on its GPU and at its m, and stores the fastest kernel: what
  /// every later process gets there for this desc's class of m, while a kernel that this one has in memory stays. One
  /// that is no faster than the path's own choice, within 1 %, does not replace it. Compiles all of them, and leaves
  /// them loaded. Code::unsupported: nothing to choose from, no cache that may be written; Code::miss under
  /// KILN_MISS=error; else what the last configuration failed with, when all did.
  struct Tuned {
    struct Candidate {
      std::string configuration;
      double us = 0; ///< median; of one that failed 0
      Status status;
    };
    std::vector<Candidate> candidates; ///< the path's own choice first
    std::size_t fastest = 0;
    std::string device; ///< its name
  };
  Result<Tuned> tune(const KernelDesc& desc);
  /// Whether the desc's path has more than one configuration, and its device is here to time them on.
  Result<bool> can_tune(const KernelDesc& desc);

  /// What a get on `target` (null: this machine) would run, from where it is stored or compiled now, for whoever wants
  /// to read it: loads and stores nothing. A GPU kernel as PTX. Code::unsupported for a path that is part of the
  /// library.
  struct Made {
    const Implementation* implementation = nullptr;
    KernelDesc canonical;
    Digest key;
    CodeObject code;
  };
  Result<Made> code(const KernelDesc& desc, const Target* target);

  /// Queues descs for one background thread, which gets them one after another (compiling where KILN_MISS is not
  /// `error`). Failures are logged; an error when a desc is bad (then nothing is queued) or no thread can be started.
  Status prefetch(std::span<const KernelDesc> descs);
  /// Waits until the queue is empty; false on time-out.
  bool wait_prefetched(std::chrono::milliseconds timeout);

  /// The layout id of packed weights for this desc (`n16k4`), the same for every m. Compiles nothing.
  Result<std::string> pack_layout(const KernelDesc& desc);

  Explanation explain(const KernelDesc& desc, const Target* target);
  EngineStats stats();

  const Config& config() const;
  const Machine& machine() const;
  const Log& log() const;
  Runtime& runtime();
  Store* store();              ///< null when the cache is off
  SystemCache* system_cache(); ///< null when there is none to look at
  RemoteCache* remote_cache(); ///< null without a remote tier
  std::span<const Implementation> implementations() const;

private:
  struct State;
  explicit Engine(State* state) : state_(state) {}
  State* state_; ///< destroyed with the last kernel
};

} // namespace kiln
