#include "jit/engine.h"

#include <algorithm>
#include <atomic>
#include <new>

#include <fmt/format.h>

#include "jit/background.h"
#include "jit/cuda/assemble.h"
#include "jit/dump.h"
#include "jit/kernel_key.h"
#include "jit/os.h"
#include "jit/perf.h"

namespace kiln {
namespace {

/// How long a thread waits for another's compile before it compiles for itself.
constexpr std::chrono::milliseconds kCompilePatience{2000};
/// How long a process waits for another's: less than its threads wait for each other.
constexpr std::chrono::milliseconds kTurnPatience{800};
/// How long a warm-up waits for others to be done with the cache.
constexpr std::chrono::seconds kWarmupPatience{5};

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

Choice choice_of(const Implementation& row, const KernelDesc& canonical, const Target& target,
                 std::string pack_layout) {
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
  choice.key_text = fields.text();
  choice.key = key_of(choice.key_text);
  return choice;
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
  std::atomic<std::uint64_t> disk_hits{0}, system_hits{0}, compiled{0}, failed{0}, fallbacks{0}, compile_us{0};
  std::atomic<bool> refuses_executable_memory{false}; ///< the system: said once, found out once
  KernelTable table;
  std::unique_ptr<Background> background; ///< ends before anything it uses

  const Config& config() const { return options.config; }
  const Target& machine_target() const { return runtime.machine.target; }
  Result<Target> target_of(const KernelDesc& canonical) const;
  Status may_load(const KernelDesc& canonical, cuda::CUstream stream) const;

  Result<Choice> choose(const KernelDesc& canonical, const Target& for_target) const;
  Result<KernelRef> lookup(const KernelDesc& canonical, MissPolicy on_miss);
  Result<KernelTable::Made> make(const KernelDesc& canonical, MissPolicy on_miss);
  Result<Kernel> from_disk(const Choice& choice, const KernelDesc& canonical, Store::Call call);
  Result<Kernel> load_row(const Choice& choice, const KernelDesc& canonical, const StoreRow& row,
                          std::chrono::steady_clock::time_point start);
  std::optional<StoreRow> stored(const Digest& key);
  Result<CodeObject> compile(const Choice& choice, const KernelDesc& canonical, const Target& for_target,
                             std::int64_t& us);
  enum class Assembler : std::uint8_t { driver, ptxas };
  Result<CodeObject> assemble(const Choice& choice, const KernelDesc& canonical, const CodeObject& ptx,
                              Assembler assembler, const std::string& ptxas, std::int64_t& us);
  Result<CodeObject> compile_ahead(const Choice& choice, const KernelDesc& canonical, const Target& for_target,
                                   bool for_this_machine, std::int64_t& us);
  Status keep(const Choice& choice, const KernelDesc& canonical, const CodeObject& code, std::int64_t us,
              Store::Call call);
  FileLock compile_turn(const Choice& choice) const;
  Status prefetch(const KernelDesc& canonical);
  void settle_for_stand_in(const KernelDesc& canonical);
  enum class Stay : bool { for_this_caller, resident };
  Result<KernelTable::Made> stand_in(const Choice& choice, const KernelDesc& canonical, Stay stay);
  const Implementation* builtin_for(const KernelDesc& canonical) const;
};

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
    store.locks_hold = [](const std::string& path) { return !os::file_system_of(path).over_network; };
    Result<std::unique_ptr<Store>> opened = Store::open(std::move(store), state->log);
    if (opened)
      state->store = std::move(*opened);
    else
      state->log.warn(fmt::format("no cache on disk: {}", opened.status().message()));
  }
  if (state->config().serves_system_cache())
    state->system =
        std::make_unique<SystemCache>(state->config().cache_system_dir, state->config().trusted_keys, state->log);
  State* const s = state.release();
  s->background = std::make_unique<Background>([s](const KernelDesc& canonical) {
    if (const Status status = s->prefetch(canonical); !status)
      s->log.warn(fmt::format("prefetch of {}: {}", canonical.text(), status.message()));
  });
  return std::unique_ptr<Engine>(new Engine(s));
}

Engine::~Engine() {
  state_->background.reset();
  state_->store.reset();
  state_->system.reset();
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
  return device ? Result<Target>((*device)->target()) : device.status();
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
    const Result<Choice> choice = choose(canonical, machine_target());
    Result<KernelTable::Made> made =
        choice ? stand_in(*choice, canonical, Stay::resident) : Result<KernelTable::Made>(choice.status());
    return made ? std::optional(std::move(*made)) : std::nullopt;
  };
  if (KernelNode* const node = table.get_or_make(canonical, stay, std::chrono::milliseconds(0)))
    KernelTable::release(node);
}

/// Disk, then the compiler. What is compiled is stored; a store that fails has said so in the log.
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
  if (refuses_executable_memory && !on_gpu)
    return stand_in(*choice, canonical, Stay::resident);
  Status not_stored;
  const auto look = [&](Store::Call call) -> std::optional<KernelTable::Made> {
    Result<Kernel> stored = from_disk(*choice, canonical, call);
    not_stored = stored ? Status() : stored.status();
    disk_hits += stored.is_ok();
    return stored ? std::optional(resident(std::move(*stored))) : std::nullopt;
  };
  if (std::optional<KernelTable::Made> stored = look(Store::Call::plain))
    return std::move(*stored);
  if (on_miss == MissPolicy::error)
    return may_not_compile(canonical, *choice->implementation);
  // Where the toggles leave nothing to fall back on (KILN_FORCE, KILN_DISABLE), the kernel is compiled now.
  if (on_miss == MissPolicy::fallback && builtin_for(canonical) != nullptr) {
    if (const Status status = background->add(canonical); !status)
      log.warn(fmt::format("{} stays with its fallback: {}", canonical.text(), status.message()));
    return stand_in(*choice, canonical, Stay::for_this_caller);
  }
  // One process at a time compiles a kernel: the next in turn finds it stored.
  const FileLock turn = compile_turn(*choice);
  if (turn.held() && not_stored.code() == Code::not_found)
    if (std::optional<KernelTable::Made> stored = look(Store::Call::in_turn))
      return std::move(*stored);
  std::int64_t us = 0;
  Result<CodeObject> code = compile(*choice, canonical, *target, us);
  if (code && on_gpu)
    code = assemble(*choice, canonical, *code, Assembler::driver, {}, us);
  if (!code)
    return code.status();
  const Store::Call call = turn.held() ? Store::Call::in_turn : Store::Call::plain;
  if (const Status status = keep(*choice, canonical, *code, us, call); !status)
    log.debug(fmt::format("{} was not stored: {}", canonical.text(), status.message()));
  Result<Kernel> kernel = Kernel::load(runtime, *choice->implementation, canonical, choice->key, std::move(*code));
  if (!kernel && kernel.status().code() == Code::unsupported && !on_gpu) {
    if (!refuses_executable_memory.exchange(true))
      log.warn(
          fmt::format("{}; reference kernels serve instead, slowly, unless KILN_FORCE or KILN_DISABLE leaves them out",
                      kernel.status().message()));
    return stand_in(*choice, canonical, Stay::resident);
  }
  if (!kernel)
    return kernel.status();
  kernel->compile_us = us;
  return resident(std::move(*kernel));
}

/// The user's cache, then the system's. Code::not_found when neither has it, else why what they have cannot be used.
Result<Kernel> Engine::State::from_disk(const Choice& choice, const KernelDesc& canonical, Store::Call call) {
  const auto start = std::chrono::steady_clock::now();
  Status reason = Status::error(Code::not_found, "not on disk");
  if (store)
    if (const std::optional<StoreRow> row = store->get(choice.key, call)) {
      Result<Kernel> kernel = load_row(choice, canonical, *row, start);
      if (kernel)
        return kernel;
      reason = kernel.status();
    }
  if (system)
    if (const std::optional<StoreRow> row = system->get(choice.key)) {
      Result<Kernel> kernel = load_row(choice, canonical, *row, start);
      if (kernel) {
        ++system_hits;
        return kernel;
      }
      reason = kernel.status();
    }
  return reason;
}

/// Without loading it.
std::optional<StoreRow> Engine::State::stored(const Digest& key) {
  std::optional<StoreRow> row;
  if (store)
    row = store->get(key);
  if (!row && system)
    row = system->get(key);
  return row;
}

Result<Kernel> Engine::State::load_row(const Choice& choice, const KernelDesc& canonical, const StoreRow& row,
                                       std::chrono::steady_clock::time_point start) {
  Result<CodeObject> code = CodeObject::parse(row.code);
  if (code && code->format == CodeFormat::ptx) // stored without a driver; making the PTX anew costs less than a look
    code = Status::error(Code::unsupported, "it is PTX that has not been assembled yet");
  Result<Kernel> kernel = code ? Kernel::load(runtime, *choice.implementation, canonical, choice.key, std::move(*code))
                               : Result<Kernel>(code.status());
  if (!kernel) {
    // That this machine cannot run it is no fault of the cache.
    const std::string message =
        fmt::format("stored kernel {} is passed over: {}", choice.key.hex().substr(0, 16), kernel.status().message());
    if (kernel.status().code() == Code::unsupported)
      log.debug(message);
    else
      log.warn(message);
    return kernel;
  }
  kernel->source = Source::disk;
  kernel->compile_us = row.compile_us;
  kernel->load_us = microseconds_since(start);
  return kernel;
}

Result<CodeObject> Engine::State::compile(const Choice& choice, const KernelDesc& canonical, const Target& for_target,
                                          std::int64_t& us) {
  const Implementation& row = *choice.implementation;
  const auto start = std::chrono::steady_clock::now();
  Result<CodeObject> code = row.compile(canonical, for_target, choice.pack_layout);
  us = microseconds_since(start);
  if (!code)
    return code;
  ++compiled;
  compile_us += static_cast<std::uint64_t>(us);
  if (log.enabled(LogLevel::debug))
    log.debug(
        fmt::format("compiled {} ({}) in {} us, {} bytes", canonical.text(), name_of(row.isa), us, code->image.size()));
  if (!config().dump_dir.empty())
    dump_code(config().dump_dir, choice.key, row.isa, canonical, *code, options.disassemble, log);
  return code;
}

/// The cubin of what compile() made; adds its time to `us`. Under KILN_DUMP_DIR the PTX is there also when it is
/// rejected.
Result<CodeObject> Engine::State::assemble(const Choice& choice, const KernelDesc& canonical, const CodeObject& ptx,
                                           Assembler assembler, const std::string& ptxas, std::int64_t& us) {
  const auto start = std::chrono::steady_clock::now();
  const auto made = [&]() -> Result<cuda::Assembled> {
    if (assembler == Assembler::ptxas)
      return cuda::assemble_with_ptxas(ptxas, ptx);
    const Result<cuda::Driver*> driver = runtime.cuda();
    return driver ? cuda::assemble_with_driver(**driver, canonical.device.index, ptx) : driver.status();
  }();
  const std::int64_t taken = microseconds_since(start);
  if (!made)
    return Status::error(
        made.status().code(),
        fmt::format("{} ({}): {}", canonical.text(), name_of(choice.implementation->isa), made.status().message()));
  us += taken;
  compile_us += static_cast<std::uint64_t>(taken);
  log.debug(fmt::format("assembled {} by {} in {} us, {} bytes", canonical.text(), made->cubin.compiler, taken,
                        made->cubin.image.size()));
  if (const std::string warnings = cuda::performance_warnings(made->log); !warnings.empty())
    log.warn(fmt::format("{} may be slow: {} says: {}", canonical.text(), made->cubin.compiler, warnings));
  if (!config().dump_dir.empty())
    dump_code(
        config().dump_dir, choice.key, choice.implementation->isa, canonical, made->cubin,
        [&](const CodeObject&) { return Result<std::string>(made->log); }, log);
  return std::move(made->cubin);
}

/// For the cache, not to be loaded now: a GPU kernel as cubin where something here can assemble it, else as PTX.
Result<CodeObject> Engine::State::compile_ahead(const Choice& choice, const KernelDesc& canonical,
                                                const Target& for_target, bool for_this_machine, std::int64_t& us) {
  Result<CodeObject> code = compile(choice, canonical, for_target, us);
  if (!code || code->format != CodeFormat::ptx)
    return code;
  if (for_this_machine)
    return assemble(choice, canonical, *code, Assembler::driver, {}, us);
  const std::string ptxas = cuda::find_ptxas(config().program_path);
  if (ptxas.empty())
    return code;
  Result<CodeObject> cubin = assemble(choice, canonical, *code, Assembler::ptxas, ptxas, us);
  if (cubin)
    return cubin;
  // A ptxas may be too old for the PTX or the SM: the driver has the last word.
  log.warn(fmt::format("{} is stored as PTX: {}", canonical.text(), cubin.status().message()));
  return code;
}

/// Stores what `compile` made, where there is a store.
Status Engine::State::keep(const Choice& choice, const KernelDesc& canonical, const CodeObject& code, std::int64_t us,
                           Store::Call call) {
  if (!store)
    return {};
  StoreRow row;
  row.key = choice.key;
  row.op = find_op(canonical.op)->name;
  row.desc = choice.key_fields.desc;
  row.isa = name_of(choice.implementation->isa);
  row.target = code.needs().text();
  row.generator = choice.implementation->generator_digest;
  row.code = code.serialise();
  row.compile_us = us;
  return store->put(row, call);
}

/// Not held where the caller compiles for itself, whatever others do.
FileLock Engine::State::compile_turn(const Choice& choice) const {
  return store ? store->compile_turn(choice.key, kTurnPatience) : FileLock();
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
  if (forced)
    reasons = fmt::format(" by {}, which KILN_FORCE demands{}", name_of(*forced),
                          reasons.empty() ? "; it has no such path" : reasons);
  return Status::error(Code::unsupported, fmt::format("nothing computes {} here{}", canonical.text(), reasons));
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
    const Result<CodeObject> code = CodeObject::parse(row->code);
    return code && (code->format != CodeFormat::ptx ||
                    (target != nullptr && cuda::find_ptxas(state_->config().program_path).empty()));
  };
  if (serves(state_->stored(choice->key)))
    return Warmed::hit;
  const FileLock turn = state_->compile_turn(*choice);
  if (turn.held() && serves(state_->store->get(choice->key, Store::Call::in_turn)))
    return Warmed::hit;
  std::int64_t us = 0;
  const Result<CodeObject> code = state_->compile_ahead(*choice, canonical, *for_target, target == nullptr, us);
  if (!code) {
    ++state_->failed;
    return code.status();
  }
  // Many may warm one cache at once. A host would not wait for them; whoever warms up has nothing better to do.
  const auto give_up = std::chrono::steady_clock::now() + kWarmupPatience;
  Status kept = state_->keep(*choice, canonical, *code, us, Store::Call::in_turn);
  while (kept.code() == Code::busy && std::chrono::steady_clock::now() < give_up)
    kept = state_->keep(*choice, canonical, *code, us, Store::Call::in_turn);
  if (!kept)
    return Status::error(kept.code(),
                         fmt::format("{} was compiled but could not be stored: {}", canonical.text(), kept.message()));
  return Warmed::compiled;
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
  const std::optional<StoreRow> stored =
      row.device == DeviceKind::cpu ? state_->stored(choice->key) : std::nullopt; // a cubin is nothing to read
  Result<CodeObject> code = stored ? CodeObject::parse(stored->code) : Status::error(Code::not_found, "not on disk");
  if (!code) {
    if (state_->config().miss == MissPolicy::error && row.device == DeviceKind::cpu)
      return may_not_compile(canonical, row);
    std::int64_t us = 0;
    code = state_->compile(*choice, canonical, *for_target, us);
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

/// The fields in which two key texts (lines of name=value, the desc's fields counting each) differ.
std::vector<std::string> differing_fields(std::string_view stored_desc, const StoreRow& row,
                                          const KernelDesc& canonical, const Implementation& implementation) {
  std::vector<std::string> fields;
  if (row.generator != implementation.generator_digest)
    fields.push_back("generator");
  if (row.isa != name_of(implementation.isa))
    fields.push_back("isa");
  const Result<KernelDesc> other = parse_desc(stored_desc);
  const OpSpec& op = *find_op(canonical.op);
  for (std::size_t i = 0; i < op.fields.size(); ++i)
    if (!other || other->value[i] != canonical.value[i])
      fields.emplace_back(op.fields[i].name);
  return fields;
}

/// Why a stored kernel of the very desc that is wanted does not serve.
std::string why_missed(Store& store, const Digest& stored_key, const KeyFields& wanted) {
  const std::string name = fmt::format("kernel {} of the same desc is stored", stored_key.hex().substr(0, 16));
  const std::optional<StoreRow> row = store.get(stored_key);
  if (!row)
    return name + ", but fails authentication";
  const Result<KeyFields> fields = key_fields_of(*row);
  return fields ? fmt::format("{}: {}", name, fields->differences_from(wanted))
                : fmt::format("{}, but {}", name, fields.status().message());
}

std::string join(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words)
    out += (out.empty() ? "" : ", ") + word;
  return out;
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
  e.key = choice.key;
  e.key_text = std::move(choice.key_text);
  if (target == nullptr)
    if (KernelNode* hit = state_->table.find(e.canonical)) {
      KernelTable::release(hit);
      e.tier = "memory";
      return e;
    }
  if (e.taken->compile == nullptr)
    return e;
  if (state_->store && state_->store->get(e.key)) {
    e.tier = "disk";
    return e;
  }
  if (state_->system && state_->system->get(e.key)) {
    e.tier = "system";
    return e;
  }
  if (!state_->store)
    return e;
  const Result<std::vector<Store::Listed>> rows = state_->store->list();
  std::size_t fewest = SIZE_MAX;
  for (const Store::Listed& listed : rows ? *rows : std::vector<Store::Listed>()) {
    if (listed.row.op != op.name)
      continue;
    std::vector<std::string> fields = differing_fields(listed.row.desc, listed.row, e.canonical, *e.taken);
    const bool same_desc = listed.row.desc == choice.key_fields.desc;
    if (same_desc && e.why.empty())
      e.why = why_missed(*state_->store, listed.row.key, choice.key_fields);
    if (fields.empty())
      fields.push_back("features or pack_layout"); // all that the readable columns do not tell apart
    if (fields.size() < fewest) {
      fewest = fields.size();
      e.nearest = fmt::format("{} {} ({}) differs in {}", listed.row.key.hex().substr(0, 16), listed.row.desc,
                              listed.row.isa, join(fields));
    }
  }
  return e;
}

EngineStats Engine::stats() {
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
  stats.compiled = state_->compiled;
  stats.failed = state_->failed;
  stats.fallbacks = state_->fallbacks;
  stats.compile_us = state_->compile_us;
  if (state_->store)
    if (const Result<StoreStats> store = state_->store->stats()) {
      stats.has_store = true;
      stats.store = *store;
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
std::span<const Implementation> Engine::implementations() const {
  return state_->options.implementations;
}

} // namespace kiln
