#include "api/kiln.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "api/c_attention.h"
#include "api/c_boundary.h"
#include "api/c_fp8_block_bmm.h"
#include "api/c_int4_mm.h"
#include "api/c_int8_linear.h"
#include "api/c_int8_mm.h"
#include "api/c_ops.h"
#include "api/c_structs.h"
#include "api/session.h"

/// The C boundary: the only place where errors turn into status codes and where exceptions of libraries end.

struct kiln_engine {
  std::unique_ptr<kiln::Engine> engine;
  std::string cache_path;
};

namespace kiln {

const COp* find_c_op(std::int32_t op) {
  static const COp table[] = {c_int8_mm(), c_int8_linear(), c_int4_mm(), c_fp8_block_bmm(), c_attention()};
  for (const COp& row : table)
    if (static_cast<std::int32_t>(row.op) == op)
      return &row;
  return nullptr;
}

namespace {

thread_local std::string last_error;

} // namespace

kiln_status report(const Status& status) {
  if (!status.is_ok())
    last_error = status.message();
  return static_cast<kiln_status>(status.code());
}

kiln_status report_exception(const char* what, kiln_status status) {
  try {
    last_error = what;
  } catch (...) { // the status says it too
  }
  return status;
}

namespace {

Status null_argument(const char* name) {
  return Status::error(Code::invalid_argument, fmt::format("{} is null", name));
}

KernelNode* node_of(kiln_kernel* kernel) {
  return reinterpret_cast<KernelNode*>(kernel);
}
const Kernel& kernel_of(const kiln_kernel* kernel) {
  return reinterpret_cast<const KernelNode*>(kernel)->value();
}

Status known_op(std::int32_t op, const COp*& row) {
  row = find_c_op(op);
  if (row == nullptr)
    return Status::error(Code::invalid_argument,
                         fmt::format("unknown op {}: known are KILN_OP_INT8_MM (1), KILN_OP_INT8_LINEAR (2), "
                                     "KILN_OP_INT4_MM (3), KILN_OP_FP8_BLOCK_BMM (4), KILN_OP_ATTENTION (5)",
                                     op));
  return {};
}

Status read_desc(const kiln_desc* given, KernelDesc& out) {
  if (given == nullptr)
    return null_argument("desc");
  if (given->size < sizeof(kiln_desc))
    return Status::error(Code::invalid_argument,
                         fmt::format("desc.size is {}: set it with the op's _INIT macro", given->size));
  const COp* row = nullptr;
  if (Status s = known_op(given->op, row); !s)
    return s;
  if (given->reserved != 0)
    return Status::error(Code::invalid_argument, fmt::format("desc.reserved is {}: allowed is 0", given->reserved));
  if (Status s = row->desc(given, out); !s)
    return s;
  if (given->device != KILN_DEVICE_CPU && given->device != KILN_DEVICE_CUDA)
    return Status::error(
        Code::invalid_argument,
        fmt::format("desc.device is {}: allowed is KILN_DEVICE_CPU (0) or KILN_DEVICE_CUDA (1)", given->device));
  const std::int32_t last_index = given->device == KILN_DEVICE_CUDA ? 255 : 0;
  if (given->device_index < 0 || given->device_index > last_index)
    return Status::error(Code::invalid_argument,
                         fmt::format("desc.device_index is {}: allowed is 0 to {}", given->device_index, last_index));
  out.device = {static_cast<DeviceKind>(given->device), static_cast<std::uint8_t>(given->device_index)};
  return {};
}

Status read_descs(const kiln_desc* const* given, std::size_t count, std::vector<KernelDesc>& out) {
  if (given == nullptr && count > 0)
    return null_argument("descs");
  out.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (Status s = read_desc(given[i], out[i]); !s)
      return Status::error(s.code(), fmt::format("descs[{}]: {}", i, s.message()));
    if (Status s = check_desc(out[i]); !s)
      return Status::error(s.code(), fmt::format("descs[{}]: {}", i, s.message()));
  }
  return {};
}

Status check_run(const kiln_kernel* kernel, const kiln_args* args, const COp*& row) {
  if (kernel == nullptr)
    return null_argument("kernel");
  if (args == nullptr)
    return null_argument("args");
  if (args->size < sizeof(kiln_args))
    return Status::error(Code::invalid_argument,
                         fmt::format("args.size is {}: set it with the op's _INIT macro", args->size));
  if (args->op != static_cast<std::int32_t>(kernel_of(kernel).desc().op))
    return Status::error(Code::invalid_argument,
                         fmt::format("args.op is {}: the kernel computes {}", args->op, kernel_of(kernel).op().name));
  return known_op(args->op, row);
}

Result<HostOptions> host_options(const kiln_engine_options* given) {
  HostOptions host;
  if (given == nullptr)
    return host;
  kiln_engine_options copy;
  const kiln_engine_options* read = nullptr;
  if (Status s = read_sized("kiln_engine_options", given, given->size, sizeof(std::size_t), copy, read); !s)
    return s;
  const kiln_engine_options& o = *read;
  if (o.cache_dir != nullptr) {
    if (o.cache_dir[0] != '/')
      return Status::error(Code::invalid_argument,
                           fmt::format("options.cache_dir is '{}': allowed is an absolute path", o.cache_dir));
    host.settings.cache_dir = o.cache_dir;
  }
  if (o.cache_mode != nullptr) {
    const std::string_view mode = o.cache_mode;
    if (mode != "rw" && mode != "ro" && mode != "off")
      return Status::error(Code::invalid_argument,
                           fmt::format("options.cache_mode is '{}': allowed is rw, ro or off", mode));
    host.settings.cache = mode == "rw" ? CacheMode::read_write : mode == "ro" ? CacheMode::read_only : CacheMode::off;
  }
  if (o.threads < 0 || o.threads > 4096)
    return Status::error(Code::invalid_argument, fmt::format("options.threads is {}: allowed is 0 to 4096", o.threads));
  if (o.reserved != 0)
    return Status::error(Code::invalid_argument, fmt::format("options.reserved is {}: allowed is 0", o.reserved));
  if (o.threads > 0)
    host.settings.threads = o.threads;
  host.parallel_for = o.parallel_for;
  host.parallel_context = o.parallel_context;
  if (o.log_sink != nullptr) {
    static_assert(static_cast<int>(LogLevel::off) == KILN_LOG_OFF);
    // The same function type but for the spelling of its enum, which both sides pass as an int.
    host.log_sink = reinterpret_cast<Log::Sink>(reinterpret_cast<void (*)()>(o.log_sink));
    host.log_context = o.log_context;
  }
  host.max_code_bytes = o.max_code_bytes;
  return host;
}

} // namespace
} // namespace kiln

using namespace kiln;

extern "C" {

const char* kiln_status_name(kiln_status status) {
  const bool known = status >= KILN_OK && status <= KILN_INTERNAL;
  return known ? name_of(static_cast<Code>(status)).data() : "unknown";
}
const char* kiln_last_error(void) {
  return last_error.c_str();
}
const char* kiln_version(void) {
  return KILN_VERSION_TEXT;
}

kiln_status kiln_engine_create(const kiln_engine_options* options, kiln_engine** engine) {
  return guarded([&]() -> Status {
    if (engine == nullptr)
      return null_argument("engine");
    *engine = nullptr;
    const Result<HostOptions> host = host_options(options);
    if (!host)
      return host.status();
    Result<std::unique_ptr<Engine>> made = make_engine(*host);
    if (!made)
      return made.status();
    std::string path = (*made)->store() != nullptr ? (*made)->store()->path() : "";
    *engine = new kiln_engine{std::move(*made), std::move(path)};
    return {};
  });
}

void kiln_engine_destroy(kiln_engine* engine) {
  delete engine;
}

kiln_status kiln_get(kiln_engine* engine, const kiln_desc* desc, kiln_kernel** kernel) {
  return guarded([&]() -> Status {
    if (kernel == nullptr)
      return null_argument("kernel");
    *kernel = nullptr;
    if (engine == nullptr)
      return null_argument("engine");
    KernelDesc d;
    if (Status s = read_desc(desc, d); !s)
      return s;
    Result<KernelRef> got = engine->engine->get(d);
    if (!got)
      return got.status();
    *kernel = reinterpret_cast<kiln_kernel*>(got->detach());
    return {};
  });
}

kiln_status kiln_get_for_stream(kiln_engine* engine, const kiln_desc* desc, void* stream, kiln_kernel** kernel) {
  return guarded([&]() -> Status {
    if (kernel == nullptr)
      return null_argument("kernel");
    *kernel = nullptr;
    if (engine == nullptr)
      return null_argument("engine");
    KernelDesc d;
    if (Status s = read_desc(desc, d); !s)
      return s;
    Result<KernelRef> got = engine->engine->get_for_stream(d, stream);
    if (!got)
      return got.status();
    *kernel = reinterpret_cast<kiln_kernel*>(got->detach());
    return {};
  });
}

void kiln_kernel_retain(kiln_kernel* kernel) {
  if (kernel != nullptr)
    KernelTable::add_reference(node_of(kernel));
}

void kiln_kernel_release(kiln_kernel* kernel) {
  if (kernel != nullptr)
    KernelTable::release(node_of(kernel));
}

kiln_status kiln_kernel_get_info(const kiln_kernel* kernel, kiln_kernel_info* info) {
  return guarded([&]() -> Status {
    if (kernel == nullptr)
      return null_argument("kernel");
    const Kernel& k = kernel_of(kernel);
    kiln_kernel_info out = KILN_KERNEL_INFO_INIT;
    out.op = k.op().name.data();
    out.desc = k.texts().desc.c_str();
    out.isa = name_of(k.implementation().isa).data();
    out.backend = name_of(k.implementation().backend).data();
    out.generator = name_of(k.implementation().generator).data();
    out.features = k.texts().features.c_str();
    out.key = k.texts().key.c_str();
    out.pack_layout = k.texts().pack_layout.c_str();
    static_assert(static_cast<int>(Source::builtin) == KILN_BUILTIN &&
                  static_cast<int>(Source::remote) == KILN_FROM_REMOTE);
    out.source = static_cast<std::int32_t>(k.source);
    out.vector_registers = k.code().vector_registers;
    out.general_registers = k.code().general_registers;
    out.code_bytes = k.code_bytes();
    out.m_min = k.m_range().min;
    out.m_max = k.m_range().max;
    out.compile_us = k.compile_us;
    out.load_us = k.load_us;
    out.configuration = k.code().configuration.c_str();
    out.tuned_for = k.code().tuned_for.c_str();
    return write_sized("info", out, info);
  });
}

kiln_status kiln_pack_create(kiln_engine* engine, const kiln_desc* desc, const void* b, int64_t ldb, kiln_pack** pack) {
  return guarded([&]() -> Status {
    if (pack == nullptr)
      return null_argument("pack");
    *pack = nullptr;
    if (engine == nullptr)
      return null_argument("engine");
    KernelDesc d;
    if (Status s = read_desc(desc, d); !s)
      return s;
    Result<std::unique_ptr<AnyPack>> made = find_c_op(desc->op)->pack(*engine->engine, d, b, ldb);
    if (!made)
      return made.status();
    *pack = new kiln_pack(std::move(*made));
    return {};
  });
}

kiln_status kiln_int4_mm_pack_create(kiln_engine* engine, const kiln_int4_mm_desc* desc,
                                     const kiln_int4_mm_weights* weights, kiln_pack** pack) {
  return guarded([&]() -> Status {
    if (pack == nullptr)
      return null_argument("pack");
    *pack = nullptr;
    if (engine == nullptr)
      return null_argument("engine");
    if (desc != nullptr && desc->base.op != KILN_OP_INT4_MM)
      return Status::error(Code::invalid_argument,
                           fmt::format("desc.op is {}: allowed is KILN_OP_INT4_MM (3)", desc->base.op));
    KernelDesc d;
    if (Status s = read_desc(desc != nullptr ? &desc->base : nullptr, d); !s)
      return s;
    if (Status s = check_desc(d); !s)
      return s;
    Result<std::unique_ptr<AnyPack>> made = make_int4_mm_pack(*engine->engine, d, weights);
    if (!made)
      return made.status();
    *pack = new kiln_pack(std::move(*made));
    return {};
  });
}

kiln_status kiln_int4_to_tensor_core(const void* plain, int64_t n, int64_t k, int32_t inner_k_tiles, void* packed) {
  return guarded([&] { return convert_int4_weights(true, plain, n, k, inner_k_tiles, packed); });
}

kiln_status kiln_int4_from_tensor_core(const void* packed, int64_t n, int64_t k, int32_t inner_k_tiles, void* plain) {
  return guarded([&] { return convert_int4_weights(false, packed, n, k, inner_k_tiles, plain); });
}

kiln_status kiln_pack_save(const kiln_pack* pack, const char* path) {
  return guarded([&]() -> Status {
    if (pack == nullptr)
      return null_argument("pack");
    if (path == nullptr)
      return null_argument("path");
    return pack->pack->save(path);
  });
}

kiln_status kiln_pack_load(kiln_engine* engine, const kiln_desc* desc, const char* path, kiln_pack** pack) {
  return guarded([&]() -> Status {
    if (pack == nullptr)
      return null_argument("pack");
    *pack = nullptr;
    if (engine == nullptr)
      return null_argument("engine");
    if (path == nullptr)
      return null_argument("path");
    KernelDesc d;
    if (Status s = read_desc(desc, d); !s)
      return s;
    Result<std::unique_ptr<AnyPack>> loaded = find_c_op(desc->op)->load_pack(*engine->engine, d, path);
    if (!loaded)
      return loaded.status();
    *pack = new kiln_pack(std::move(*loaded));
    return {};
  });
}

void kiln_pack_retain(kiln_pack* pack) {
  if (pack != nullptr)
    pack->references.fetch_add(1, std::memory_order_relaxed);
}

void kiln_pack_release(kiln_pack* pack) {
  if (pack != nullptr && pack->references.fetch_sub(1, std::memory_order_acq_rel) == 1)
    delete pack;
}

kiln_status kiln_pack_get_info(const kiln_pack* pack, kiln_pack_info* info) {
  return guarded([&]() -> Status {
    if (pack == nullptr)
      return null_argument("pack");
    const AnyPack::Info i = pack->pack->info();
    return write_sized("info", kiln_pack_info{sizeof(kiln_pack_info), i.op, i.layout, i.n, i.k, i.bytes}, info);
  });
}

kiln_status kiln_run(const kiln_kernel* kernel, const kiln_args* args) {
  return guarded([&]() -> Status {
    const COp* row = nullptr;
    if (Status s = check_run(kernel, args, row); !s)
      return s;
    return row->run(kernel_of(kernel), args);
  });
}

kiln_status kiln_workspace_bytes(const kiln_kernel* kernel, const kiln_args* args, uint64_t* bytes) {
  return guarded([&]() -> Status {
    if (bytes == nullptr)
      return null_argument("bytes");
    const COp* row = nullptr;
    if (Status s = check_run(kernel, args, row); !s)
      return s;
    const Result<std::uint64_t> needed = row->workspace_bytes(kernel_of(kernel), args);
    if (!needed)
      return needed.status();
    *bytes = *needed;
    return {};
  });
}

kiln_status kiln_prefetch(kiln_engine* engine, const kiln_desc* const* descs, size_t count) {
  return guarded([&]() -> Status {
    if (engine == nullptr)
      return null_argument("engine");
    std::vector<KernelDesc> list;
    if (Status s = read_descs(descs, count, list); !s)
      return s;
    return engine->engine->prefetch(list);
  });
}

kiln_status kiln_prefetch_wait(kiln_engine* engine, int64_t timeout_ms) {
  return guarded([&]() -> Status {
    if (engine == nullptr)
      return null_argument("engine");
    constexpr std::int64_t kMost = 24ll * 3600 * 1000;
    if (timeout_ms < 0 || timeout_ms > kMost)
      return Status::error(Code::invalid_argument,
                           fmt::format("timeout_ms is {}: allowed is 0 to {}", timeout_ms, kMost));
    if (!engine->engine->wait_prefetched(std::chrono::milliseconds(timeout_ms)))
      return Status::error(Code::busy, fmt::format("the prefetch list is not empty after {} ms", timeout_ms));
    return {};
  });
}

kiln_status kiln_warmup(kiln_engine* engine, const kiln_desc* const* descs, size_t count, const char* target,
                        kiln_warmup_result* result) {
  return guarded([&]() -> Status {
    if (engine == nullptr)
      return null_argument("engine");
    if (result != nullptr)
      if (Status s = check_sized("result", result); !s)
        return s;
    std::vector<KernelDesc> list;
    if (Status s = read_descs(descs, count, list); !s)
      return s;
    Target other;
    if (target != nullptr) {
      Result<Target> parsed = Target::parse(target);
      if (!parsed)
        return parsed.status();
      other = *parsed;
    }
    kiln_warmup_result counts = KILN_WARMUP_RESULT_INIT;
    Status first_failure;
    for (const KernelDesc& desc : list) {
      const Result<Engine::Warmed> warmed = engine->engine->warmup(desc, target != nullptr ? &other : nullptr);
      if (!warmed) {
        ++counts.failed;
        if (first_failure.is_ok())
          first_failure = warmed.status();
      } else {
        ++(*warmed == Engine::Warmed::hit ? counts.hit : counts.compiled);
      }
    }
    if (result != nullptr)
      if (Status s = write_sized("result", counts, result); !s)
        return s;
    return first_failure;
  });
}

kiln_status kiln_tune(kiln_engine* engine, const kiln_desc* const* descs, size_t count, kiln_tune_result* result) {
  return guarded([&]() -> Status {
    if (engine == nullptr)
      return null_argument("engine");
    if (result != nullptr)
      if (Status s = check_sized("result", result); !s)
        return s;
    std::vector<KernelDesc> list;
    if (Status s = read_descs(descs, count, list); !s)
      return s;
    kiln_tune_result counts = KILN_TUNE_RESULT_INIT;
    Status first_failure;
    for (const KernelDesc& desc : one_for_each_kernel(list)) {
      const Result<bool> can = engine->engine->can_tune(desc);
      if (can && !*can) {
        ++counts.without;
        continue;
      }
      const Result<Engine::Tuned> tuned = can ? engine->engine->tune(desc) : Result<Engine::Tuned>(can.status());
      ++(tuned ? counts.tuned : counts.failed);
      if (!tuned && first_failure.is_ok())
        first_failure = tuned.status();
    }
    if (result != nullptr)
      if (Status s = write_sized("result", counts, result); !s)
        return s;
    return first_failure;
  });
}

kiln_status kiln_get_stats(kiln_engine* engine, kiln_stats* stats) {
  return guarded([&]() -> Status {
    if (engine == nullptr)
      return null_argument("engine");
    const EngineStats s = engine->engine->stats();
    kiln_stats out = KILN_STATS_INIT;
    out.memory_hits = s.memory_hits;
    out.disk_hits = s.disk_hits;
    out.compiled = s.compiled;
    out.failed = s.failed;
    out.fallbacks = s.fallbacks;
    out.kernels = s.kernels;
    out.code_bytes = s.code_bytes;
    out.evictions = s.evictions;
    out.compile_us = s.compile_us;
    out.cache_rows = static_cast<std::uint64_t>(s.store.rows);
    out.cache_bytes = static_cast<std::uint64_t>(s.store.bytes);
    out.cache_refused = static_cast<std::uint64_t>(s.store.refused);
    out.cache_errors = static_cast<std::uint64_t>(s.store.errors);
    out.system_hits = s.system_hits;
    out.system_refused = s.system_refused;
    out.remote_hits = s.remote_hits;
    out.remote_refused = s.remote_refused;
    out.remote_errors = s.remote_errors;
    out.cache_misses = static_cast<std::uint64_t>(s.store.misses);
    out.cache_puts = static_cast<std::uint64_t>(s.store.puts);
    out.cache_evictions = static_cast<std::uint64_t>(s.store.evictions);
    out.cache_busy = static_cast<std::uint64_t>(s.store.busy);
    out.cache_refused_mac = static_cast<std::uint64_t>(s.store.refused_mac);
    out.cache_refused_key_file = static_cast<std::uint64_t>(s.store.refused_key_file);
    out.cache_refused_code = static_cast<std::uint64_t>(s.store.refused_code);
    out.cache_refused_features = static_cast<std::uint64_t>(s.store.refused_features);
    out.cache_refused_size = static_cast<std::uint64_t>(s.store.refused_size);
    return write_sized("stats", out, stats);
  });
}

const char* kiln_cache_path(kiln_engine* engine) {
  return engine != nullptr ? engine->cache_path.c_str() : "";
}

} // extern "C"
