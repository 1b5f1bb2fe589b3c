#include "jit/engine.h"

#include <algorithm>
#include <atomic>
#include <new>

#include <fmt/format.h>

#include "jit/background.h"
#include "jit/cuda/assemble.h"
#include "jit/cuda/timing.h"
#include "jit/dump.h"
#include "jit/kernel_key.h"
#include "jit/miss.h"
#include "jit/os.h"
#include "jit/perf.h"

namespace kiln {
namespace {

/// How long a thread waits for another's compile before it compiles for itself.
constexpr std::chrono::milliseconds kCompilePatience{2000};
/// How long a warm-up waits for others to be done with the cache.
constexpr std::chrono::seconds kWarmupPatience{5};
/// Calls of each configuration that tuning times, and how much slower than the fastest the path's own choice may be and
/// stay: less is noise.
constexpr int kTuningRounds = 15;
constexpr double kTuningMargin = 1.01;

std::int64_t microseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start).count();
}

} // namespace

// ---------------------------------------------------------------- candidates and keys

namespace {

/// One implementation's kernel for one canonical desc on one target: everything its key is made of.
struct Choice {
  const Implementation* implementation = nullptr;
  std::string pack_layout; ///< of the weights, empty for an op without packs
  KeyFields key_fields;
  std::string key_text;
  Digest key;
};

enum class Declines : std::uint8_t { heed, ignore };

/// Why this row does not serve the desc on the target under these toggles; empty when it does.
std::string refusal(const Implementation& row, const KernelDesc& desc, const Target& target, const Config& config,
                    std::optional<IsaPath> forced, Declines declines = Declines::heed) {
  if (row.device != desc.device.kind)
    return "for another device";
  if (row.device == DeviceKind::cpu && target.arch == Arch::nvptx)
    return "for CPUs";
  if (row.device == DeviceKind::cuda && target.arch != Arch::nvptx)
    return "for NVIDIA GPUs";
  if (!row.any_arch && row.arch != target.arch)
    return fmt::format("made for {}", name_of(row.arch));
  if (forced && row.isa != *forced)
    return fmt::format("KILN_FORCE takes {} only", name_of(*forced));
  if (config.disables(row))
    return "left out by KILN_DISABLE";
  if (const Features missing = row.features_for(desc, target).without(target.features); !missing.empty())
    return fmt::format("the machine lacks {}", missing.text());
  if (row.supports != nullptr)
    if (const Status status = row.supports(desc, target); !status)
      return status.message();
  if (!forced && declines == Declines::heed && row.declines != nullptr)
    return row.declines(desc, target);
  return {};
}

/// The first row that serves the desc, from weights of this layout unless it is null. A row declines in favour of a
/// later one: where toggles or the layout leave no other generated code, it serves all the same.
const Implementation* serving(std::span<const Implementation> rows, const KernelDesc& desc, const Target& target,
                              const Config& config, std::optional<IsaPath> forced, const std::string* pack_layout) {
  const Implementation* builtin = nullptr;
  for (const Declines declines : {Declines::heed, Declines::ignore})
    for (const Implementation& row : rows) {
      if (row.op != desc.op || !refusal(row, desc, target, config, forced, declines).empty() ||
          (pack_layout != nullptr && !row.reads(*pack_layout, desc, target)))
        continue;
      if (row.builtin == nullptr)
        return &row;
      if (builtin == nullptr)
        builtin = &row;
    }
  return builtin;
}

/// The layout in which weights of this desc are packed here, whatever their m: that of the first row that serves them
/// with m unknown. Empty for an op without packs, or when no row serves them.
std::string pack_layout_for(std::span<const Implementation> rows, const KernelDesc& canonical, const Target& target,
                            const Config& config, std::optional<IsaPath> forced) {
  const OpSpec& op = *find_op(canonical.op);
  if (op.pack_desc == nullptr)
    return {};
  const KernelDesc weights = op.pack_desc(canonical);
  const Implementation* const row = serving(rows, weights, target, config, forced, nullptr);
  return row != nullptr && row->pack_layout != nullptr ? row->pack_layout(weights, target) : std::string();
}

/// Like refusal, and why the row does not read weights of this layout.
std::string refusal(const Implementation& row, const KernelDesc& desc, const Target& target, const Config& config,
                    std::optional<IsaPath> forced, std::string_view pack_layout) {
  std::string reason = refusal(row, desc, target, config, forced);
  if (reason.empty() && !row.reads(pack_layout, desc, target))
    reason = fmt::format("reads packs of {}, these weights are packed as {} here", row.pack_layout(desc, target),
                         pack_layout);
  return reason;
}

/// `tuning`: KeyFields::tuning.
Choice choice_of(const Implementation& row, const KernelDesc& canonical, const Target& target, std::string pack_layout,
                 std::string tuning = {}) {
  Choice choice;
  choice.implementation = &row;
  choice.pack_layout = std::move(pack_layout);
  if (row.compile == nullptr)
    return choice; // nothing to store
  KernelDesc portable = canonical;
  portable.device.index = 0; // which of several equal devices changes no code
  KeyFields& fields = choice.key_fields;
  fields.generator = row.generator_digest;
  fields.desc = portable.text();
  fields.isa = name_of(row.isa);
  fields.arch = target.arch;
  fields.features = row.features_for(canonical, target);
  fields.vector_bits = row.vector_bits ? row.vector_bits(target) : 0;
  fields.sm = target.sm;
  fields.pack_layout = choice.pack_layout;
  fields.tuning = std::move(tuning);
  choice.key_text = fields.text();
  choice.key = key_of(choice.key_text);
  return choice;
}

/// What is stored of a kernel that was compiled in so many microseconds.
StoreRow row_of(const Choice& choice, const CodeObject& code, std::int64_t us) {
  StoreRow row;
  row.key = choice.key;
  row.op = find_op(choice.implementation->op)->name;
  row.desc = choice.key_fields.desc;
  row.isa = name_of(choice.implementation->isa);
  row.target = code.needs().text();
  row.generator = choice.implementation->generator_digest;
  row.code = code.serialise();
  row.compile_us = us;
  return row;
}

/// A device's name as a key and a code object have it.
std::string tuning_name(const cuda::DeviceInfo& device) {
  std::string name = device.name.substr(0, 64);
  std::replace_if(
      name.begin(), name.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return name.empty() ? "?" : name;
}

Status may_not_compile(const KernelDesc& canonical, const Implementation& row) {
  return Status::error(Code::miss, fmt::format("{} ({}) is not cached and KILN_MISS=error forbids compiling it",
                                               canonical.text(), name_of(row.isa)));
}

} // namespace

// ---------------------------------------------------------------- the engine

struct Engine::State {
  explicit State(EngineOptions o)
      : options(std::move(o)), log(options.config.log, options.log_sink, options.log_context),
        runtime(options.machine, options.config.perf == PerfMode::map,
                options.config.threads > 0 ? options.config.threads : options.machine.cores, options.parallel_for,
                options.parallel_context, options.cuda_library),
        perf(options.config.perf, log), table(options.max_code_bytes, [this] { delete this; }) {}

  EngineOptions options;
  Log log;
  Runtime runtime;
  PerfReporter perf;
  std::unique_ptr<Store> store;
  std::unique_ptr<SystemCache> system; ///< under the store; null without KILN_CACHE_SYSTEM_DIR
  std::unique_ptr<RemoteCache> remote; ///< behind both; null without KILN_REMOTE
  std::atomic<std::uint64_t> disk_hits{0}, system_hits{0}, remote_hits{0}, compiled{0}, failed{0}, fallbacks{0},
      compile_us{0};
  std::atomic<bool> said_refused{false};
  /// See tell_store. A flag, no mutex: a child made by fork meanwhile must not wait for it.
  std::atomic<bool> telling{false};
  UsageCounts told;                              ///< so far
  std::chrono::steady_clock::time_point told_at; ///< last
  KernelTable table;
  std::unique_ptr<Background> background; ///< ends before anything it uses

  const Config& config() const { return options.config; }
  const Target& machine_target() const { return runtime.machine.target; }
  Result<Target> target_of(const KernelDesc& canonical) const;
  Status may_load(const KernelDesc& canonical, cuda::CUstream stream) const;

  Result<Choice> choose(const KernelDesc& canonical, const Target& for_target) const;
  std::optional<Choice> tuned(const Choice& choice, const KernelDesc& canonical, const Target& for_target) const;
  std::optional<CodeObject> tuned_code(const Choice& tuned) const;
  Result<KernelRef> lookup(const KernelDesc& canonical, MissPolicy on_miss);
  Result<KernelTable::Made> make(const KernelDesc& canonical, MissPolicy on_miss);
  Result<Kernel> from_disk(const Choice& choice, const KernelDesc& canonical, Store::Call call);
  std::optional<Kernel> from_remote(const Choice& choice, const KernelDesc& canonical, Store::Call call);
  /// Why a row could not be loaded, as the store counts it; null where the row is not at fault.
  using Refusal = std::int64_t UsageCounts::*;
  Result<Kernel> load_row(const Choice& choice, const KernelDesc& canonical, const VerifiedRow& row, Source source,
                          std::chrono::steady_clock::time_point start, Refusal& why);
  void count(const UsageCounts& counts) const;
  void tell_store(std::chrono::steady_clock::duration at_most_every);
  std::optional<StoreRow> stored(const Digest& key);
  std::optional<StoreRow> seen(const Digest& key) const;
  Result<LoadableCode> compile(const Choice& choice, const KernelDesc& canonical, const Target& for_target,
                               std::int64_t& us);
  Result<LoadableCode> assemble(const Choice& choice, const KernelDesc& canonical, const LoadableCode& ptx,
                                std::int64_t& us, const std::string& ptxas = {});
  Result<LoadableCode> compile_ahead(const Choice& choice, const KernelDesc& canonical, const Target& for_target,
                                     bool for_this_machine, std::int64_t& us);
  Status keep(const StoreRow& row, Store::Call call);
  Status keep_patiently(const StoreRow& row);
  void publish(const StoreRow& row, RemoteCache::Patience patience);
  FileLock compile_turn(const Choice& choice) const;
  bool has_no_executable_memory();
  Status prefetch(const KernelDesc& canonical);
  void settle_for_stand_in(const KernelDesc& canonical);
  enum class Stay : bool { for_this_caller, resident };
  Result<KernelTable::Made> stand_in(const Choice& choice, const KernelDesc& canonical, Stay stay);
  const Implementation* builtin_for(const KernelDesc& canonical) const;
};

namespace {

RemoteOptions remote_options(const Config& config, const Log& log) {
  RemoteOptions options;
  options.url = *config.remote;
  options.trusted_keys_file = config.trusted_keys;
  options.check_row = check_row;
  if (!config.remote_signing_key.empty()) {
    Result<SecretKey> key = SecretKey::load(config.remote_signing_key);
    if (key)
      options.signing_key.emplace(std::move(*key));
    else
      log.warn(fmt::format("KILN_REMOTE_SIGNING_KEY: {}; nothing is written to {}", key.status().message(),
                           config.remote->text()));
  }
  return options;
}

} // namespace

Result<std::unique_ptr<Engine>> Engine::create(EngineOptions options) {
  auto state = std::make_unique<State>(std::move(options));
  for (const std::string& warning : state->config().warnings)
    state->log.warn(warning);
  if (state->config().cache != CacheMode::off && !state->config().disk_disabled) {
    StoreOptions store;
    store.directory = state->config().cache_dir;
    store.key_directory = state->config().key_dir;
    store.mode = state->config().cache;
    store.max_bytes = state->config().cache_max_mb << 20;
    Result<std::unique_ptr<Store>> opened = Store::open(std::move(store), state->log);
    if (opened)
      state->store = std::move(*opened);
    else
      state->log.warn(fmt::format("no cache on disk: {}", opened.status().message()));
  }
  if (state->config().serves_system_cache())
    state->system =
        std::make_unique<SystemCache>(state->config().cache_system_dir, state->config().trusted_keys, state->log);
  if (state->config().serves_remote_cache())
    state->remote = std::make_unique<RemoteCache>(remote_options(state->config(), state->log), state->log);
  State* const s = state.release();
  s->background = std::make_unique<Background>([s](const KernelDesc& canonical) {
    if (const Status status = s->prefetch(canonical); !status)
      s->log.warn(fmt::format("prefetch of {}: {}", canonical.text(), status.message()));
  });
  return std::unique_ptr<Engine>(new Engine(s));
}

Engine::~Engine() {
  state_->background.reset();
  state_->tell_store({});
  state_->store.reset();
  state_->system.reset();
  state_->remote.reset();
  state_->table.close(); // deletes the state now, or with the last kernel
}

Result<KernelRef> Engine::get(const KernelDesc& desc) {
  if (Status status = check_desc(desc); !status)
    return status;
  const KernelDesc canonical = find_op(desc.op)->canonical(desc);
  if (KernelNode* hit = state_->table.find(canonical))
    return KernelRef(hit);
  return state_->lookup(canonical, state_->config().miss);
}

Result<KernelRef> Engine::get_for_stream(const KernelDesc& desc, void* stream) {
  if (Status status = check_desc(desc); !status)
    return status;
  if (desc.device.kind != DeviceKind::cuda)
    return Status::error(Code::invalid_argument,
                         fmt::format("{}: only a desc of device cuda has to do with a stream", desc.text()));
  const KernelDesc canonical = find_op(desc.op)->canonical(desc);
  if (KernelNode* hit = state_->table.find(canonical))
    return KernelRef(hit);
  if (Status status = state_->may_load(canonical, static_cast<cuda::CUstream>(stream)); !status)
    return status;
  return state_->lookup(canonical, state_->config().miss);
}

/// Code::busy while the stream is being captured: loading would end the capture.
Status Engine::State::may_load(const KernelDesc& canonical, cuda::CUstream stream) const {
  const Result<cuda::Driver*> driver = runtime.cuda();
  if (!driver)
    return driver.status();
  const Result<cuda::ContextScope> scope = cuda::ContextScope::enter(**driver, canonical.device.index, stream);
  if (!scope)
    return scope.status();
  const Result<bool> capturing = cuda::is_capturing(**driver, stream);
  if (!capturing)
    return capturing.status();
  if (*capturing)
    return Status::error(Code::busy, fmt::format("{} is not loaded, and a stream is being captured into a graph: get "
                                                 "the kernel before the capture begins",
                                                 canonical.text()));
  return {};
}

Result<Target> Engine::target_of(const KernelDesc& desc) const {
  return state_->target_of(desc);
}

Result<Target> Engine::State::target_of(const KernelDesc& canonical) const {
  if (canonical.device.kind == DeviceKind::cpu)
    return machine_target();
  const Result<cuda::Driver*> driver = runtime.cuda();
  if (!driver)
    return driver.status();
  const Result<const cuda::DeviceInfo*> device = (*driver)->device(canonical.device.index);
  if (!device)
    return device.status();
  const Target target = (*device)->target();
  const std::optional<Target>& wanted = options.gpu_target;
  if (!wanted || *wanted == target)
    return target;
  if (wanted->arch != Arch::nvptx || wanted->sm >= kFirstArchSpecificSm || wanted->sm > target.sm)
    return Status::error(Code::unsupported, fmt::format("cuda:{} is {}, which cannot run kernels for {}",
                                                        canonical.device.index, target.text(), wanted->text()));
  return *wanted;
}

/// L1 again, under its lock; then one thread makes the kernel and the others wait for it.
Result<KernelRef> Engine::State::lookup(const KernelDesc& canonical, MissPolicy on_miss) {
  Status failure;
  const auto make_or_remember = [&]() -> std::optional<KernelTable::Made> {
    try {
      Result<KernelTable::Made> made = make(canonical, on_miss);
      if (made)
        return std::move(*made);
      failure = made.status();
    } catch (const std::exception& e) { // libraries throw; waiters must be told all the same
      failure = Status::error(Code::out_of_memory, fmt::format("{}: {}", canonical.text(), e.what()));
    }
    return std::nullopt;
  };
  // Who wants a kernel now, whichever, does not wait for another thread's compile.
  const auto patience = on_miss == MissPolicy::fallback ? std::chrono::milliseconds(0) : kCompilePatience;
  KernelNode* const node = table.get_or_make(canonical, make_or_remember, patience);
  if (node != nullptr)
    return KernelRef(node);
  ++failed;
  return failure;
}

/// In the background, whose thread must not end in an exception. KILN_MISS=error forbids compiling here too.
Status Engine::State::prefetch(const KernelDesc& canonical) {
  try {
    const Result<KernelRef> kernel =
        lookup(canonical, config().miss == MissPolicy::error ? MissPolicy::error : MissPolicy::compile);
    if (kernel)
      return {};
    if (kernel.status().code() == Code::compile_failed && config().miss == MissPolicy::fallback)
      settle_for_stand_in(canonical);
    return kernel.status();
  } catch (const std::exception& e) {
    return Status::error(Code::out_of_memory, e.what());
  }
}

/// A generator that failed once fails again: without an entry, each get would have it tried anew in the background.
void Engine::State::settle_for_stand_in(const KernelDesc& canonical) {
  const auto stay = [&]() -> std::optional<KernelTable::Made> {
    const Result<Target> target = target_of(canonical);
    const Result<Choice> choice = target ? choose(canonical, *target) : Result<Choice>(target.status());
    Result<KernelTable::Made> made =
        choice ? stand_in(*choice, canonical, Stay::resident) : Result<KernelTable::Made>(choice.status());
    return made ? std::optional(std::move(*made)) : std::nullopt;
  };
  if (KernelNode* const node = table.get_or_make(canonical, stay, std::chrono::milliseconds(0)))
    KernelTable::release(node);
}

/// Disk, the remote tier, then the compiler. What comes from these two is stored; a store that fails has said so in the
/// log.
Result<KernelTable::Made> Engine::State::make(const KernelDesc& canonical, MissPolicy on_miss) {
  const bool on_gpu = canonical.device.kind == DeviceKind::cuda;
  const Result<Target> target = target_of(canonical);
  if (!target)
    return target.status();
  // What can be seen without a stream: a capture by a stream that waits for the default one.
  if (on_gpu)
    if (Status status = may_load(canonical, nullptr); !status)
      return status;
  const Result<Choice> choice = choose(canonical, *target);
  if (!choice)
    return choice.status();
  const auto resident = [&](Kernel kernel) {
    if (!on_gpu)
      perf.loaded(kernel.text().data(), kernel.text().size(),
                  fmt::format("kiln {} {}", canonical.text(), name_of(kernel.implementation().isa)));
    const std::size_t weight = kernel.code_bytes() + sizeof(Kernel);
    return KernelTable::Made{std::move(kernel), weight};
  };
  if (choice->implementation->builtin != nullptr) {
    Result<Kernel> kernel = Kernel::builtin(runtime, *choice->implementation, canonical, choice->pack_layout);
    return kernel ? Result<KernelTable::Made>(resident(std::move(*kernel))) : kernel.status();
  }
  if (!on_gpu && has_no_executable_memory())
    return stand_in(*choice, canonical, Stay::resident);
  if (const std::optional<Choice> by_timing = tuned(*choice, canonical, *target)) {
    Result<Kernel> stored = from_disk(*by_timing, canonical, Store::Call::plain);
    if (stored) {
      ++disk_hits;
      return resident(std::move(*stored));
    }
    if (stored.status().code() == Code::not_found)
      count({.misses = -1}); // a lookup more than the call
  }
  Status not_stored;
  const auto look = [&](Store::Call call) -> std::optional<KernelTable::Made> {
    Result<Kernel> stored = from_disk(*choice, canonical, call);
    not_stored = stored ? Status() : stored.status();
    disk_hits += stored.is_ok();
    return stored ? std::optional(resident(std::move(*stored))) : std::nullopt;
  };
  if (std::optional<KernelTable::Made> stored = look(Store::Call::plain))
    return std::move(*stored);
  if (!on_gpu && has_no_executable_memory()) // found out by a kernel that is stored
    return stand_in(*choice, canonical, Stay::resident);
  const auto look_afar = [&](Store::Call call) -> std::optional<KernelTable::Made> {
    if (not_stored.code() != Code::not_found) // what is here and cannot be used is there too
      return std::nullopt;
    std::optional<Kernel> kernel = from_remote(*choice, canonical, call);
    return kernel ? std::optional(resident(std::move(*kernel))) : std::nullopt;
  };
  if (on_miss == MissPolicy::error) {
    if (std::optional<KernelTable::Made> fetched = look_afar(Store::Call::plain))
      return std::move(*fetched);
    if (!on_gpu && has_no_executable_memory())
      return stand_in(*choice, canonical, Stay::resident);
    return may_not_compile(canonical, *choice->implementation);
  }
  // Where the toggles leave nothing to fall back on (KILN_FORCE, KILN_DISABLE), the kernel is compiled now.
  if (on_miss == MissPolicy::fallback && builtin_for(canonical) != nullptr) {
    if (const Status status = background->add(canonical); !status)
      log.warn(fmt::format("{} stays with its fallback: {}", canonical.text(), status.message()));
    return stand_in(*choice, canonical, Stay::for_this_caller);
  }
  // One process at a time fetches or compiles a kernel: the next in turn finds it stored.
  FileLock turn = compile_turn(*choice);
  if (turn.held() && not_stored.code() == Code::not_found)
    if (std::optional<KernelTable::Made> stored = look(Store::Call::in_turn))
      return std::move(*stored);
  const Store::Call call = turn.held() ? Store::Call::in_turn : Store::Call::plain;
  if (std::optional<KernelTable::Made> fetched = look_afar(call))
    return std::move(*fetched);
  if (!on_gpu && has_no_executable_memory())
    return stand_in(*choice, canonical, Stay::resident);
  std::int64_t us = 0;
  Result<LoadableCode> code = compile(*choice, canonical, *target, us);
  if (code && on_gpu)
    code = assemble(*choice, canonical, *code, us);
  if (!code)
    return code.status();
  if (store || (remote && remote->writes())) {
    const StoreRow row = row_of(*choice, **code, us);
    if (const Status status = keep(row, call); !status)
      log.debug(fmt::format("{} was not stored: {}", canonical.text(), status.message()));
    turn.release();
    publish(row, RemoteCache::Patience::host);
  }
  tell_store(std::chrono::seconds(1));
  Result<Kernel> kernel = Kernel::load(runtime, *choice->implementation, canonical, choice->key, std::move(*code));
  if (!kernel && !on_gpu && has_no_executable_memory())
    return stand_in(*choice, canonical, Stay::resident);
  if (!kernel)
    return kernel.status();
  kernel->compile_us = us;
  return resident(std::move(*kernel));
}

/// Whether the system refuses to map code for execution, which the first kernel to be loaded finds out. Says so once.
bool Engine::State::has_no_executable_memory() {
  if (!runtime.memory.is_refused())
    return false;
  if (!said_refused.exchange(true))
    log.warn("the system refuses executable memory; reference kernels serve instead, slowly, unless KILN_FORCE or "
             "KILN_DISABLE leaves them out");
  return true;
}

/// The user's cache, then the system's. Code::not_found when neither has it, else why what they have cannot be used.
Result<Kernel> Engine::State::from_disk(const Choice& choice, const KernelDesc& canonical, Store::Call call) {
  const auto start = std::chrono::steady_clock::now();
  Status reason = Status::error(Code::not_found, "not on disk");
  Refusal why = nullptr;
  if (store)
    if (const std::optional<VerifiedRow> row = store->get(choice.key, call)) {
      Result<Kernel> kernel = load_row(choice, canonical, *row, Source::disk, start, why);
      if (kernel)
        return kernel;
      if (why != nullptr)
        store->refuse(choice.key, why);
      reason = kernel.status();
    }
  if (system)
    if (const std::optional<VerifiedRow> row = system->get(choice.key)) {
      Result<Kernel> kernel = load_row(choice, canonical, *row, Source::disk, start, why);
      if (kernel) {
        ++system_hits;
        count({.system_hits = 1, .misses = -1}); // the store has counted a miss
        return kernel;
      }
      if (why != nullptr) {
        UsageCounts refused{.refused = 1};
        refused.*why = 1;
        count(refused);
      }
      reason = kernel.status();
    }
  return reason;
}

/// What comes from there is authenticated anew for the cache on disk, and stored.
std::optional<Kernel> Engine::State::from_remote(const Choice& choice, const KernelDesc& canonical, Store::Call call) {
  const auto start = std::chrono::steady_clock::now();
  const std::optional<VerifiedRow> row = remote ? remote->get(choice.key, RemoteCache::Patience::host) : std::nullopt;
  if (!row)
    return std::nullopt;
  Refusal why = nullptr;
  Result<Kernel> kernel = load_row(choice, canonical, *row, Source::remote, start, why);
  if (!kernel)
    return std::nullopt;
  ++remote_hits;
  count({.misses = -1, .remote_hits = 1}); // the store has counted a miss
  if (const Status status = keep(*row, call); !status)
    log.debug(fmt::format("{} was not stored: {}", canonical.text(), status.message()));
  return std::move(*kernel);
}

/// Without loading it.
std::optional<StoreRow> Engine::State::stored(const Digest& key) {
  std::optional<StoreRow> row;
  if (store)
    row = store->get(key);
  if (!row && system && (row = system->get(key)))
    count({.system_hits = 1, .misses = -1});
  return row;
}

/// Likewise, and without being counted as a use.
std::optional<StoreRow> Engine::State::seen(const Digest& key) const {
  if (store)
    if (Result<StoreRow> row = store->look(key))
      return std::move(*row);
  return system ? system->get(key) : std::nullopt;
}

/// For all processes: where there is a store.
void Engine::State::count(const UsageCounts& counts) const {
  if (store)
    store->count(counts);
}

/// What is counted where no call may wait, or outside of the store: hits in memory, what the system cache and the
/// remote tier refused, and calls there that failed.
void Engine::State::tell_store(std::chrono::steady_clock::duration at_most_every) {
  if (!store)
    return;
  if (telling.exchange(true))
    return; // another thread does
  UsageCounts news;
  if (const auto now = std::chrono::steady_clock::now(); now - told_at >= at_most_every) {
    told_at = now;
    const auto hits = static_cast<std::int64_t>(table.stats().hits);
    const std::int64_t refused = system ? system->stats().refused : 0;
    const RemoteCache::Stats afar = remote ? remote->stats() : RemoteCache::Stats();
    news.memory_hits = hits - std::exchange(told.memory_hits, hits);
    news.refused_system = refused - std::exchange(told.refused_system, refused);
    news.refused_remote = afar.refused - std::exchange(told.refused_remote, afar.refused);
    news.refused = news.refused_system + news.refused_remote;
    news.remote_errors = afar.errors - std::exchange(told.remote_errors, afar.errors);
  }
  telling = false;
  if (news != UsageCounts())
    store->count(news);
}

Result<Kernel> Engine::State::load_row(const Choice& choice, const KernelDesc& canonical, const VerifiedRow& row,
                                       Source source, std::chrono::steady_clock::time_point start, Refusal& why) {
  Result<LoadableCode> code = LoadableCode::parse(row);
  const bool is_ptx = code && (*code)->format == CodeFormat::ptx;
  const Status runs =
      code ? Kernel::check_machine(machine_target(), *choice.implementation, canonical, **code) : code.status();
  Result<Kernel> kernel = runs ? Kernel::load(runtime, *choice.implementation, canonical, choice.key, std::move(*code))
                               : Result<Kernel>(runs);
  if (!kernel) {
    const bool is_unsupported = kernel.status().code() == Code::unsupported;
    why = kernel.status().code() == Code::integrity ? &UsageCounts::refused_code
          : !runs && !is_ptx                        ? &UsageCounts::refused_features
                                                    : nullptr; // no executable memory, or none at all
    // That this machine cannot run it is no fault of the cache.
    const std::string message =
        fmt::format("stored kernel {} is passed over: {}", choice.key.hex().substr(0, 16), kernel.status().message());
    if (is_unsupported)
      log.debug(message);
    else
      log.warn(message);
    return kernel;
  }
  kernel->source = source;
  kernel->compile_us = row->compile_us;
  kernel->load_us = microseconds_since(start);
  return kernel;
}

Result<LoadableCode> Engine::State::compile(const Choice& choice, const KernelDesc& canonical, const Target& for_target,
                                            std::int64_t& us) {
  const Implementation& row = *choice.implementation;
  const auto start = std::chrono::steady_clock::now();
  Result<LoadableCode> code = LoadableCode::compile(row, canonical, for_target, choice.pack_layout);
  us = microseconds_since(start);
  if (!code) {
    count({.compile_failures = 1});
    return code;
  }
  ++compiled;
  compile_us += static_cast<std::uint64_t>(us);
  count({.compiles = 1, .compile_us = us});
  if (log.enabled(LogLevel::debug))
    log.debug(fmt::format("compiled {} ({}) in {} us, {} bytes", canonical.text(), name_of(row.isa), us,
                          (*code)->image.size()));
  if (!config().dump_dir.empty())
    dump_code(config().dump_dir, choice.key, row.isa, canonical, **code, options.disassemble, log);
  return code;
}

/// Where there is a cache on disk.
Status Engine::State::keep(const StoreRow& row, Store::Call call) {
  return store ? store->put(row, call) : Status();
}

/// Many may warm one cache at once. A host would not wait for them; whoever warms up has nothing better to do.
Status Engine::State::keep_patiently(const StoreRow& row) {
  const auto give_up = std::chrono::steady_clock::now() + kWarmupPatience;
  Status kept = keep(row, Store::Call::in_turn);
  while (kept.code() == Code::busy && std::chrono::steady_clock::now() < give_up)
    kept = keep(row, Store::Call::in_turn);
  return kept;
}

/// To the remote tier, with a signing key. What fails there is counted and logged there.
void Engine::State::publish(const StoreRow& row, RemoteCache::Patience patience) {
  if (remote && remote->writes())
    (void)remote->put(row, patience);
}

/// The cubin of what compile() made, by the driver or by a `ptxas`; adds its time to `us`. Under KILN_DUMP_DIR the PTX
/// is there also when it is rejected.
Result<LoadableCode> Engine::State::assemble(const Choice& choice, const KernelDesc& canonical, const LoadableCode& ptx,
                                             std::int64_t& us, const std::string& ptxas) {
  const auto start = std::chrono::steady_clock::now();
  std::string said;
  const auto made = [&]() -> Result<LoadableCode> {
    if (!ptxas.empty())
      return LoadableCode::assemble(ptx, ptxas, said);
    const Result<cuda::Driver*> driver = runtime.cuda();
    return driver ? LoadableCode::assemble(ptx, **driver, canonical.device.index, said) : driver.status();
  };
  Result<LoadableCode> cubin = made();
  const std::int64_t taken = microseconds_since(start);
  if (!cubin) {
    count({.compile_failures = 1});
    return Status::error(
        cubin.status().code(),
        fmt::format("{} ({}): {}", canonical.text(), name_of(choice.implementation->isa), cubin.status().message()));
  }
  us += taken;
  compile_us += static_cast<std::uint64_t>(taken);
  count({.compile_us = taken});
  if (log.enabled(LogLevel::debug))
    log.debug(fmt::format("assembled {} by {} in {} us, {} bytes", canonical.text(), (*cubin)->compiler, taken,
                          (*cubin)->image.size()));
  if (const std::string warnings = cuda::performance_warnings(said); !warnings.empty())
    log.warn(fmt::format("{} may be slow: {} says: {}", canonical.text(), (*cubin)->compiler, warnings));
  if (!config().dump_dir.empty())
    dump_code(
        config().dump_dir, choice.key, choice.implementation->isa, canonical, **cubin,
        [&](const CodeObject&) { return Result<std::string>(said); }, log);
  return cubin;
}

/// For the cache, not to be loaded now: a GPU kernel as cubin where something here can assemble it, else as PTX.
Result<LoadableCode> Engine::State::compile_ahead(const Choice& choice, const KernelDesc& canonical,
                                                  const Target& for_target, bool for_this_machine, std::int64_t& us) {
  Result<LoadableCode> code = compile(choice, canonical, for_target, us);
  if (!code || (*code)->format != CodeFormat::ptx)
    return code;
  if (for_this_machine)
    return assemble(choice, canonical, *code, us);
  const std::string ptxas = cuda::find_ptxas(config().program_path);
  if (ptxas.empty())
    return code;
  Result<LoadableCode> cubin = assemble(choice, canonical, *code, us, ptxas);
  if (cubin)
    return cubin;
  // A ptxas may be too old for the PTX or the SM: the driver has the last word.
  log.warn(fmt::format("{} is stored as PTX: {}", canonical.text(), cubin.status().message()));
  return code;
}

/// Not held where the caller compiles for itself, whatever others do.
FileLock Engine::State::compile_turn(const Choice& choice) const {
  return store ? store->compile_turn(choice.key, options.turn_patience) : FileLock();
}

/// A builtin kernel that reads the same packs as the chosen one.
Result<KernelTable::Made> Engine::State::stand_in(const Choice& choice, const KernelDesc& canonical, Stay stay) {
  const Implementation* const row = builtin_for(canonical);
  if (row == nullptr)
    return Status::error(Code::unsupported, fmt::format("{}: the system refuses executable memory, and KILN_FORCE or "
                                                        "KILN_DISABLE leaves nothing that can do without",
                                                        canonical.text()));
  Result<Kernel> kernel = Kernel::builtin(runtime, *row, canonical, choice.pack_layout);
  if (!kernel)
    return kernel.status();
  ++fallbacks;
  count({.fallbacks = 1});
  return KernelTable::Made{std::move(*kernel), sizeof(Kernel), stay == Stay::resident};
}

/// What may stand in for generated code under the present toggles; null when there is nothing.
const Implementation* Engine::State::builtin_for(const KernelDesc& canonical) const {
  const std::optional<IsaPath> forced =
      config().forced_path(canonical.op, canonical.device.kind, options.implementations);
  for (const Implementation& row : options.implementations)
    if (row.op == canonical.op && row.builtin != nullptr &&
        refusal(row, canonical, machine_target(), config(), forced).empty())
      return &row;
  return nullptr;
}

Result<Choice> Engine::State::choose(const KernelDesc& canonical, const Target& for_target) const {
  const std::optional<IsaPath> forced =
      config().forced_path(canonical.op, canonical.device.kind, options.implementations);
  std::string layout = pack_layout_for(options.implementations, canonical, for_target, config(), forced);
  if (const Implementation* const row =
          serving(options.implementations, canonical, for_target, config(), forced, &layout))
    return choice_of(*row, canonical, for_target, std::move(layout));
  std::string reasons;
  for (const Implementation& row : options.implementations)
    if (row.op == canonical.op && (!forced || row.isa == *forced) && row.device == canonical.device.kind)
      reasons +=
          fmt::format("; {}: {}", name_of(row.isa), refusal(row, canonical, for_target, config(), forced, layout));
  if (reasons.empty() && !forced)
    reasons = fmt::format(": {} has no path for {} devices", find_op(canonical.op)->name,
                          canonical.device.kind == DeviceKind::cuda ? "cuda" : "cpu");
  if (forced)
    reasons = fmt::format(" by {}, which KILN_FORCE demands{}", name_of(*forced),
                          reasons.empty() ? "; it has no such path" : reasons);
  return Status::error(Code::unsupported, fmt::format("nothing computes {} here{}", canonical.text(), reasons));
}

/// The same path with whatever configuration was the fastest on the desc's device; nothing where it has but one, or the
/// target is not that device.
std::optional<Choice> Engine::State::tuned(const Choice& choice, const KernelDesc& canonical,
                                           const Target& for_target) const {
  if (choice.implementation->configurations == nullptr || canonical.device.kind != DeviceKind::cuda)
    return std::nullopt;
  const Result<cuda::Driver*> driver = runtime.cuda();
  if (!driver)
    return std::nullopt;
  const Result<const cuda::DeviceInfo*> device = (*driver)->device(canonical.device.index);
  if (!device || !((*device)->target() == for_target))
    return std::nullopt;
  return choice_of(*choice.implementation, canonical, for_target, choice.pack_layout, tuning_name(**device));
}

/// What is stored of it, without being counted as a use.
std::optional<CodeObject> Engine::State::tuned_code(const Choice& tuned) const {
  const std::optional<StoreRow> row = seen(tuned.key);
  Result<CodeObject> code = row ? CodeObject::parse(row->code) : Status::error(Code::not_found, "");
  return code ? std::optional(std::move(*code)) : std::nullopt;
}

// ---------------------------------------------------------------- beside the path of a call

Result<Engine::Warmed> Engine::warmup(const KernelDesc& desc, const Target* target) {
  if (Status status = check_desc(desc); !status)
    return status;
  if (!state_->store || state_->config().cache != CacheMode::read_write)
    return Status::error(
        Code::unsupported,
        "warmup needs a cache on disk that may be written: see KILN_CACHE, KILN_CACHE_DIR and KILN_DISABLE");
  const KernelDesc canonical = find_op(desc.op)->canonical(desc);
  const Result<Target> for_target = target != nullptr ? *target : state_->target_of(canonical);
  if (!for_target)
    return for_target.status();
  const Result<Choice> choice = state_->choose(canonical, *for_target);
  if (!choice)
    return choice.status();
  if (choice->implementation->compile == nullptr)
    return Warmed::hit; // part of the library
  // PTX alone will do where nothing can assemble it.
  const auto serves = [&](const std::optional<StoreRow>& row) {
    if (!row)
      return false;
    if (choice->implementation->device == DeviceKind::cpu)
      return true;
    const Result<CodeObject> code = CodeObject::parse(row->code);
    return code && (code->format != CodeFormat::ptx ||
                    (target != nullptr && cuda::find_ptxas(state_->config().program_path).empty()));
  };
  const auto there_already = [&](const StoreRow& row) {
    state_->publish(row, RemoteCache::Patience::batch);
    return Warmed::hit;
  };
  const auto not_kept = [&](const Status& why, std::string_view what) {
    return Status::error(why.code(),
                         fmt::format("{} was {} but could not be stored: {}", canonical.text(), what, why.message()));
  };
  // What a remote tier carries is the heuristic's kernel: a machine that writes to it keeps that one warm.
  if (target == nullptr && !(state_->remote && state_->remote->writes()))
    if (const std::optional<Choice> by_timing = state_->tuned(*choice, canonical, *for_target))
      if (const std::optional<StoreRow> row = state_->seen(by_timing->key); serves(row))
        return there_already(*row);
  if (const std::optional<StoreRow> row = state_->stored(choice->key); serves(row))
    return there_already(*row);
  // Not within the turn: hosts may wait for it, and must not wait for a slow server.
  if (state_->remote)
    if (const std::optional<StoreRow> row = state_->remote->get(choice->key, RemoteCache::Patience::batch);
        serves(row)) {
      state_->count({.misses = -1, .remote_hits = 1}); // the store has counted a miss
      if (const Status kept = state_->keep_patiently(*row); !kept)
        return not_kept(kept, "fetched");
      return Warmed::hit;
    }
  FileLock turn = state_->compile_turn(*choice);
  if (turn.held())
    if (const std::optional<StoreRow> row = state_->store->get(choice->key, Store::Call::in_turn); serves(row)) {
      turn.release();
      return there_already(*row);
    }
  std::int64_t us = 0;
  const Result<LoadableCode> code = state_->compile_ahead(*choice, canonical, *for_target, target == nullptr, us);
  if (!code) {
    ++state_->failed;
    return code.status();
  }
  const StoreRow row = row_of(*choice, **code, us);
  if (const Status kept = state_->keep_patiently(row); !kept)
    return not_kept(kept, "compiled");
  turn.release();
  state_->publish(row, RemoteCache::Patience::batch);
  return Warmed::compiled;
}

Result<bool> Engine::can_tune(const KernelDesc& desc) {
  if (Status status = check_desc(desc); !status)
    return status;
  const OpSpec& op = *find_op(desc.op);
  const KernelDesc canonical = op.canonical(desc);
  const Result<Target> target = state_->target_of(canonical);
  if (!target)
    return target.status();
  const Result<Choice> choice = state_->choose(canonical, *target);
  if (!choice)
    return choice.status();
  return op.timing_problem != nullptr && op.operations(desc) != 0 && // there is something to time
         state_->tuned(*choice, canonical, *target).has_value();
}

Result<Engine::Tuned> Engine::tune(const KernelDesc& desc) {
  if (Status status = check_desc(desc); !status)
    return status;
  if (!state_->store || config().cache != CacheMode::read_write)
    return Status::error(Code::unsupported, "tuning needs a cache on disk that may be written: see KILN_CACHE, "
                                            "KILN_CACHE_DIR and KILN_DISABLE");
  const OpSpec& op = *find_op(desc.op);
  if (op.operations(desc) == 0) // an m of kAny makes it negative
    return Status::error(Code::invalid_argument, fmt::format("{}: there is nothing to time: a size is 0", desc.text()));
  const KernelDesc canonical = op.canonical(desc);
  const Result<Target> target = state_->target_of(canonical);
  if (!target)
    return target.status();
  const Result<Choice> choice = state_->choose(canonical, *target);
  if (!choice)
    return choice.status();
  const Implementation& row = *choice->implementation;
  const std::optional<Choice> by_timing = state_->tuned(*choice, canonical, *target);
  if (!by_timing || op.timing_problem == nullptr)
    return Status::error(Code::unsupported, fmt::format("{} ({}) has but one configuration: there is nothing to tune",
                                                        canonical.text(), name_of(row.isa)));
  if (config().miss == MissPolicy::error)
    return may_not_compile(canonical, row);
  Tuned tuned;
  tuned.device = by_timing->key_fields.tuning;
  for (std::string& configuration : row.configurations(canonical, *target))
    tuned.candidates.push_back({std::move(configuration), 0, {}});

  struct Entry {
    Tuned::Candidate* candidate;
    StoreRow row;
    Kernel kernel;
  };
  std::vector<Entry> entries;
  const auto make = [&](Tuned::Candidate& candidate) -> Status {
    const auto start = std::chrono::steady_clock::now();
    const Result<LoadableCode> ptx =
        LoadableCode::compile(row, canonical, *target, choice->pack_layout, candidate.configuration, tuned.device);
    if (!ptx)
      return ptx.status();
    std::int64_t us = microseconds_since(start);
    Result<LoadableCode> code = state_->assemble(*by_timing, canonical, *ptx, us);
    if (!code)
      return code.status();
    StoreRow stored = row_of(*by_timing, **code, us);
    Result<Kernel> kernel = Kernel::load(state_->runtime, row, canonical, by_timing->key, std::move(*code));
    if (!kernel)
      return kernel.status();
    entries.push_back({&candidate, std::move(stored), std::move(*kernel)});
    return {};
  };
  const auto left_out = [&](const Tuned::Candidate& candidate) {
    log().warn(fmt::format("tuning {}: {} is left out: {}", canonical.text(), candidate.configuration,
                           candidate.status.message()));
  };
  for (Tuned::Candidate& candidate : tuned.candidates)
    if (candidate.status = make(candidate); !candidate.status)
      left_out(candidate);
  if (entries.empty())
    return tuned.candidates.empty() ? Status::error(Code::internal, "a path without a configuration")
                                    : tuned.candidates.back().status;
  const Result<std::unique_ptr<TimingProblem>> problem = op.timing_problem(desc, state_->runtime);
  if (!problem)
    return problem.status();
  // What this GPU does not launch, as a cluster that a slice of it has no room for, is left out.
  std::vector<const Entry*> launched;
  for (const Entry& entry : entries) {
    entry.candidate->status = (*problem)->run(entry.kernel, nullptr);
    if (entry.candidate->status)
      launched.push_back(&entry);
    else
      left_out(*entry.candidate);
  }
  if (launched.empty())
    return entries.back().candidate->status;
  std::vector<cuda::StreamWork> works;
  for (const Entry* entry : launched)
    works.push_back([&problem, entry](cuda::CUstream stream) { return (*problem)->run(entry->kernel, stream); });
  const Result<cuda::Driver*> driver = state_->runtime.cuda();
  if (!driver)
    return driver.status();
  const Result<std::vector<double>> times =
      cuda::time_on_device(**driver, canonical.device.index, works, kTuningRounds);
  if (!times)
    return Status::error(times.status().code(),
                         fmt::format("timing {}: {}", canonical.text(), times.status().message()));
  std::size_t fastest = 0;
  for (std::size_t i = 0; i < launched.size(); ++i) {
    launched[i]->candidate->us = (*times)[i];
    if ((*times)[i] < (*times)[fastest])
      fastest = i;
  }
  if ((*times)[0] <= kTuningMargin * (*times)[fastest])
    fastest = 0;
  tuned.fastest = static_cast<std::size_t>(launched[fastest]->candidate - tuned.candidates.data());
  if (const Status kept = state_->keep_patiently(launched[fastest]->row); !kept)
    return Status::error(kept.code(),
                         fmt::format("{} was tuned but could not be stored: {}", canonical.text(), kept.message()));
  return tuned;
}

Result<Engine::Made> Engine::code(const KernelDesc& desc, const Target* target) {
  if (Status status = check_desc(desc); !status)
    return status;
  const KernelDesc canonical = find_op(desc.op)->canonical(desc);
  const Result<Target> for_target = target != nullptr ? *target : state_->target_of(canonical);
  if (!for_target)
    return for_target.status();
  const Result<Choice> choice = state_->choose(canonical, *for_target);
  if (!choice)
    return choice.status();
  const Implementation& row = *choice->implementation;
  if (row.compile == nullptr)
    return Status::error(Code::unsupported,
                         fmt::format("the path {} is part of the library: it has no generated code", name_of(row.isa)));
  const bool on_cpu = row.device == DeviceKind::cpu; // a cubin is nothing to read
  std::optional<StoreRow> stored = on_cpu ? state_->seen(choice->key) : std::nullopt;
  if (!stored && on_cpu && state_->remote)
    stored = state_->remote->get(choice->key, RemoteCache::Patience::batch);
  Result<CodeObject> code = stored ? CodeObject::parse(stored->code) : Status::error(Code::not_found, "not stored");
  if (!code) {
    if (state_->config().miss == MissPolicy::error && row.device == DeviceKind::cpu)
      return may_not_compile(canonical, row);
    std::int64_t us = 0;
    const std::optional<Choice> by_timing =
        target == nullptr ? state_->tuned(*choice, canonical, *for_target) : std::nullopt;
    const std::optional<CodeObject> tuned = by_timing ? state_->tuned_code(*by_timing) : std::nullopt;
    Result<LoadableCode> compiled = tuned ? LoadableCode::compile(row, canonical, *for_target, choice->pack_layout,
                                                                  tuned->configuration, tuned->tuned_for)
                                          : state_->compile(*choice, canonical, *for_target, us);
    if (compiled && tuned)
      return Made{&row, canonical, by_timing->key, std::move(*compiled).take()};
    code = compiled ? Result<CodeObject>(std::move(*compiled).take()) : Result<CodeObject>(compiled.status());
  }
  if (!code)
    return code.status();
  return Made{&row, canonical, choice->key, std::move(*code)};
}

Status Engine::prefetch(std::span<const KernelDesc> descs) {
  for (const KernelDesc& desc : descs)
    if (Status status = check_desc(desc); !status)
      return status;
  for (const KernelDesc& desc : descs)
    if (Status status = state_->background->add(find_op(desc.op)->canonical(desc)); !status)
      return status;
  return {};
}

bool Engine::wait_prefetched(std::chrono::milliseconds timeout) {
  return state_->background->wait_empty(timeout);
}

Result<std::string> Engine::pack_layout(const KernelDesc& desc) {
  if (Status status = check_desc(desc); !status)
    return status;
  const Result<Target> target = state_->target_of(desc);
  if (!target)
    return target.status();
  const Result<Choice> choice = state_->choose(find_op(desc.op)->canonical(desc), *target);
  if (!choice)
    return choice.status();
  if (choice->pack_layout.empty())
    return Status::error(Code::unsupported, fmt::format("{} takes no packed weights", find_op(desc.op)->name));
  return choice->pack_layout;
}

namespace {

std::vector<IsaPath> paths_without(const KernelDesc& desc, Arch arch, std::span<const Implementation> table) {
  std::vector<IsaPath> paths;
  const auto is_of_target = [&](const Implementation& row) {
    return row.device == desc.device.kind && (row.any_arch || row.device != DeviceKind::cpu || row.arch == arch);
  };
  for (const Implementation& row : table) {
    const auto is_same = [&](const Implementation& other) {
      return other.op == desc.op && other.isa == row.isa && is_of_target(other);
    };
    if (is_of_target(row) && std::none_of(table.begin(), table.end(), is_same) &&
        std::find(paths.begin(), paths.end(), row.isa) == paths.end())
      paths.push_back(row.isa);
  }
  return paths;
}

} // namespace

Explanation Engine::explain(const KernelDesc& desc, const Target* target) {
  Explanation e;
  const OpSpec& op = *find_op(desc.op);
  e.canonical = op.canonical(desc);
  e.m_range = op.m_range(e.canonical);
  e.tier = "none";
  const Result<Target> found = target != nullptr ? *target : state_->target_of(e.canonical);
  if (!found) {
    for (const Implementation& row : state_->options.implementations)
      if (row.op == e.canonical.op)
        e.candidates.push_back(
            {&row, false,
             row.device == e.canonical.device.kind ? found.status().message() : std::string("for another device")});
    return e;
  }
  const Target& for_target = *found;
  e.without_implementation = paths_without(e.canonical, for_target.arch, implementations());
  const std::optional<IsaPath> forced =
      config().forced_path(e.canonical.op, e.canonical.device.kind, implementations());
  e.pack_layout = pack_layout_for(implementations(), e.canonical, for_target, config(), forced);
  e.taken = serving(implementations(), e.canonical, for_target, config(), forced, &e.pack_layout);
  for (const Implementation& row : state_->options.implementations) {
    if (row.op != e.canonical.op)
      continue;
    Explanation::Candidate candidate{&row, &row == e.taken, {}};
    if (!candidate.taken) {
      candidate.reason = refusal(row, e.canonical, for_target, config(), forced);
      if (candidate.reason.empty() && (e.taken == nullptr || &row < e.taken))
        candidate.reason = refusal(row, e.canonical, for_target, config(), forced, e.pack_layout);
      if (candidate.reason.empty())
        candidate.reason = fmt::format("{} is preferred", name_of(e.taken->isa));
    }
    e.candidates.push_back(std::move(candidate));
  }
  if (e.taken == nullptr)
    return e;
  if (e.taken->assumes != nullptr)
    e.assumes = e.taken->assumes(for_target);
  Choice choice = choice_of(*e.taken, e.canonical, for_target, e.pack_layout);
  if (e.taken->configurations != nullptr)
    if (std::vector<std::string> all = e.taken->configurations(e.canonical, for_target); !all.empty())
      e.configuration = std::move(all.front());
  if (const std::optional<Choice> by_timing =
          target == nullptr ? state_->tuned(choice, e.canonical, for_target) : std::nullopt)
    if (std::optional<CodeObject> code = state_->tuned_code(*by_timing)) {
      e.configuration = std::move(code->configuration);
      e.tuned_for = std::move(code->tuned_for);
      choice = *by_timing;
    }
  e.key = choice.key;
  e.key_text = choice.key_text;
  if (target == nullptr)
    if (KernelNode* hit = state_->table.find(e.canonical)) {
      KernelTable::release(hit);
      e.tier = "memory";
      return e;
    }
  if (e.taken->compile == nullptr)
    return e;
  const Result<StoreRow> stored =
      state_->store ? state_->store->look(e.key) : Status::error(Code::not_found, "there is no store");
  if (stored)
    e.tier = "disk";
  else if (state_->system && state_->system->get(e.key))
    e.tier = "system";
  else if (state_->remote && state_->remote->get(e.key, RemoteCache::Patience::host))
    e.tier = "remote";
  else
    explain_miss(e, state_->store.get(), stored.status(), choice.key_fields, config());
  return e;
}

EngineStats Engine::stats() {
  state_->tell_store({});
  EngineStats stats;
  const auto table = state_->table.stats();
  stats.memory_hits = table.hits;
  stats.kernels = table.resident;
  stats.evictions = table.evictions;
  stats.code_bytes = table.weight;
  stats.disk_hits = state_->disk_hits;
  stats.system_hits = state_->system_hits;
  if (state_->system)
    stats.system_refused = state_->system->stats().refused;
  stats.remote_hits = state_->remote_hits;
  if (state_->remote) {
    const RemoteCache::Stats remote = state_->remote->stats();
    stats.remote_refused = static_cast<std::uint64_t>(remote.refused);
    stats.remote_errors = static_cast<std::uint64_t>(remote.errors);
  }
  stats.compiled = state_->compiled;
  stats.failed = state_->failed;
  stats.fallbacks = state_->fallbacks;
  stats.compile_us = state_->compile_us;
  if (state_->store) {
    if (const Result<StoreStats> store = state_->store->stats())
      stats.store = *store;
    static_cast<UsageCounts&>(stats.store) = state_->store->counts(); // also of a database that cannot be read
  }
  return stats;
}

const Config& Engine::config() const {
  return state_->config();
}
const Machine& Engine::machine() const {
  return state_->runtime.machine;
}
const Log& Engine::log() const {
  return state_->log;
}
Runtime& Engine::runtime() {
  return state_->runtime;
}
Store* Engine::store() {
  return state_->store.get();
}
SystemCache* Engine::system_cache() {
  return state_->system.get();
}
RemoteCache* Engine::remote_cache() {
  return state_->remote.get();
}
std::span<const Implementation> Engine::implementations() const {
  return state_->options.implementations;
}

} // namespace kiln
