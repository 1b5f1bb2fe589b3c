#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include <fmt/format.h>

#include "api/cli/command.h"
#include "api/cli/manifest.h"
#include "api/cli/model.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "api/session.h"

namespace kiln::cli {
namespace {

struct Options {
  std::vector<std::string> words;
  std::string model, scheme;
  std::optional<std::string> target;
  std::vector<std::int64_t> tokens;
  int jobs = 0;
  bool tune = false, json = false;
};

Status usage(std::string message) {
  return Status::error(Code::invalid_argument, std::move(message));
}

Result<std::vector<KernelDesc>> asked_descs(const Options& options) {
  if (options.model.empty() != options.scheme.empty() || options.model.empty() != options.tokens.empty())
    return usage(fmt::format("--model config.json, --scheme and --tokens go together: {} is missing",
                             options.model.empty()    ? "--model"
                             : options.scheme.empty() ? "--scheme"
                                                      : "--tokens"));
  if (!options.model.empty()) {
    if (!options.words.empty())
      return usage(fmt::format("'{}': give either --model, a manifest or an op", options.words.front()));
    return model_kernels(options.model, options.scheme, options.tokens);
  }
  if (options.words.empty())
    return usage("nothing to warm up: give a manifest, --model config.json, or an op with its fields");
  if (options.words.size() == 1 && find_op(options.words.front()) == nullptr)
    return read_manifest(options.words.front());
  const Result<KernelDesc> desc = desc_from_words(options.words);
  if (!desc)
    return desc.status();
  return std::vector<KernelDesc>{*desc};
}

/// One of each kernel: descs that share one are the same work.
std::vector<KernelDesc> kernels_of(const std::vector<KernelDesc>& descs) {
  std::vector<KernelDesc> kernels;
  for (const KernelDesc& desc : descs) {
    const KernelDesc canonical = find_op(desc.op)->canonical(desc);
    if (std::find(kernels.begin(), kernels.end(), canonical) == kernels.end())
      kernels.push_back(canonical);
  }
  return kernels;
}

/// A bar on stderr where that is a terminal, else nothing. Any thread.
class ProgressBar {
public:
  explicit ProgressBar(std::size_t total) : total_(total), shown_(::isatty(STDERR_FILENO) == 1 && total > 1) {}
  ~ProgressBar() {
    if (shown_)
      fmt::print(stderr, "\r\x1b[K");
  }
  void advance() {
    if (!shown_)
      return;
    std::lock_guard lock(mutex_);
    ++done_;
    const std::size_t filled = done_ * kWidth / total_;
    fmt::print(stderr, "\r[{}{}] {}/{}", std::string(filled, '#'), std::string(kWidth - filled, '.'), done_, total_);
    std::fflush(stderr);
  }

private:
  static constexpr std::size_t kWidth = 40;
  const std::size_t total_;
  const bool shown_;
  std::mutex mutex_;
  std::size_t done_ = 0;
};

using Outcome = std::optional<Result<Engine::Warmed>>;

std::vector<Outcome> warm(Engine& engine, const std::vector<KernelDesc>& kernels, const Target* target, int jobs) {
  std::vector<Outcome> outcomes(kernels.size());
  std::atomic<std::size_t> next{0};
  ProgressBar bar(kernels.size());
  const auto work = [&] {
    for (std::size_t i; (i = next++) < kernels.size(); bar.advance())
      outcomes[i] = engine.warmup(kernels[i], target);
  };
  std::vector<std::jthread> others;
  const std::size_t threads = std::min(static_cast<std::size_t>(jobs), kernels.size());
  for (std::size_t i = 1; i < threads; ++i)
    others.emplace_back(work);
  work();
  others.clear();
  return outcomes;
}

/// One after another: each wants the GPU for itself. What has nothing to choose from is warmed up.
Result<Exit> tune(Engine& engine, const std::vector<KernelDesc>& descs, bool json) {
  const std::vector<KernelDesc> kernels = one_for_each_kernel(descs);
  std::size_t tuned = 0, warmed = 0, failed = 0;
  Json list = Json::array();
  ProgressBar bar(kernels.size());
  for (const KernelDesc& desc : kernels) {
    Json one = {{"desc", desc.text()}};
    const auto fail = [&](const Status& status) {
      ++failed;
      one["result"] = "failed";
      one["error"] = status.message();
      report_error(status.message());
    };
    const Result<bool> can = engine.can_tune(desc);
    if (!can) {
      fail(can.status());
    } else if (!*can) {
      const Result<Engine::Warmed> outcome = engine.warmup(desc, nullptr);
      if (outcome) {
        ++warmed;
        one["result"] = *outcome == Engine::Warmed::hit ? "hit" : "compiled";
      } else {
        fail(outcome.status());
      }
    } else if (const Result<Engine::Tuned> outcome = engine.tune(desc); !outcome) {
      fail(outcome.status());
    } else {
      ++tuned;
      Json candidates = Json::array();
      for (const Engine::Tuned::Candidate& candidate : outcome->candidates)
        candidates.push_back({{"configuration", candidate.configuration},
                              {"us", candidate.status ? Json(candidate.us) : Json()},
                              {"error", candidate.status.message()}});
      const Engine::Tuned::Candidate &best = outcome->candidates[outcome->fastest], &own = outcome->candidates.front();
      one["result"] = "tuned";
      one["configuration"] = best.configuration;
      one["us"] = best.us;
      one["heuristic"] = own.configuration;
      one["heuristic_us"] = own.status ? Json(own.us) : Json();
      one["device"] = outcome->device;
      one["candidates"] = std::move(candidates);
      if (!json)
        print_line(fmt::format(
            "{}: {}, {} of {} configurations{}", desc.text(), best.configuration, microseconds_text(best.us),
            outcome->candidates.size(),
            outcome->fastest == 0 ? ", the heuristic's own"
            : own.status          ? fmt::format(", the heuristic's {} {}", own.configuration, microseconds_text(own.us))
                                  : ""));
    }
    list.push_back(std::move(one));
    bar.advance();
  }
  if (json)
    print_json({{"descs", descs.size()},
                {"kernels", kernels.size()},
                {"tuned", tuned},
                {"warmed", warmed},
                {"failed", failed},
                {"results", list}});
  else
    print_line(fmt::format("{}: {} tuned, {} without a choice warmed up, {} failed",
                           count_text(std::ssize(kernels), "kernel"), tuned, warmed, failed));
  return failed == 0 ? Exit::ok : Exit::failed;
}

Result<Exit> warmup(const Options& options) {
  const Result<std::optional<Target>> parsed = parse_target(options.target);
  if (!parsed)
    return parsed.status();
  const std::optional<Target>& target = *parsed;
  if (options.tune && target)
    return usage(fmt::format("--tune with --target {}: only a GPU of this machine can be timed", *options.target));
  Result<std::vector<KernelDesc>> descs = asked_descs(options);
  if (!descs)
    return descs.status();
  for (KernelDesc& desc : *descs)
    take_device_of(target, desc);
  const Result<std::unique_ptr<Engine>> engine = make_engine({});
  if (!engine)
    return engine.status();

  if (options.tune)
    return tune(**engine, *descs, options.json);
  const std::vector<KernelDesc> kernels = kernels_of(*descs);
  const int jobs = options.jobs > 0 ? options.jobs : (*engine)->runtime().parallel.threads();
  const auto start = std::chrono::steady_clock::now();
  const std::vector<Outcome> outcomes = warm(**engine, kernels, target ? &*target : nullptr, jobs);
  const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();

  std::size_t hit = 0, compiled = 0;
  Json list = Json::array();
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    const Result<Engine::Warmed>& outcome = *outcomes[i];
    Json one = {{"desc", kernels[i].text()}};
    if (!outcome) {
      one["result"] = "failed";
      one["error"] = outcome.status().message();
      report_error(outcome.status().message());
    } else {
      const bool was_there = *outcome == Engine::Warmed::hit;
      ++(was_there ? hit : compiled);
      one["result"] = was_there ? "hit" : "compiled";
    }
    list.push_back(std::move(one));
  }
  const std::size_t failed = kernels.size() - hit - compiled;
  RemoteCache* const remote = (*engine)->remote_cache();
  const std::int64_t written = remote != nullptr ? remote->stats().written : 0;
  if (options.json)
    print_json({{"target", (target ? *target : (*engine)->machine().target).text()},
                {"descs", descs->size()},
                {"kernels", kernels.size()},
                {"hit", hit},
                {"compiled", compiled},
                {"failed", failed},
                {"written_to_remote", written},
                {"ms", ms},
                {"results", list}});
  else
    print_line(fmt::format(
        "{} for {}: {} hit, {} compiled, {} failed in {}{}", count_text(std::ssize(kernels), "kernel"),
        count_text(std::ssize(*descs), "desc"), hit, compiled, failed, microseconds_text(ms * 1e3),
        remote != nullptr && remote->writes() ? fmt::format("; {} written to {}", written, remote->url().text()) : ""));
  return failed == 0 ? Exit::ok : Exit::failed;
}

} // namespace

Command warmup_command(Arguments kiln) {
  const auto options = std::make_shared<Options>();
  const Arguments arguments = kiln.add_command("warmup", "Fill the cache on disk ahead of time");
  arguments.words("WHAT", options->words, "A manifest (MANIFEST.json), or an op, then field=value");
  arguments.option("--model", options->model, "A model's config.json (Hugging Face): the kernels of its layers");
  arguments.option(
      "--scheme", options->scheme,
      "Which of them, and how quantised: w8a8 (int8_mm), w8a8-dynamic (int8_linear), fp8-block (fp8_block_bmm), "
      "attention, or a comma list");
  arguments.option("--tokens", options->tokens, 1, INT32_MAX, "Numbers of tokens per call, as 1,16,128");
  arguments.option("--target", options->target,
                   "Another machine: what its `kiln info --target` prints, or a name that `kiln info` lists");
  arguments.option("-j,--jobs", options->jobs, 1, 1024, "Compile so many at once (default: the cores)");
  arguments.flag("--tune", options->tune,
                 "Time the configurations of GPU kernels that have several here, and keep the fastest of each");
  arguments.flag("--json", options->json, "Print one JSON object");
  return {arguments, [options] { return warmup(*options); }};
}

} // namespace kiln::cli
