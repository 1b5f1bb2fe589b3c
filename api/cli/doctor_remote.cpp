#include <ranges>

#include <fmt/format.h>

#include "api/cli/doctor.h"
#include "api/cli/output.h"
#include "cache/signing.h"

namespace kiln::cli {

void check_remote_cache(Report& report, Engine& engine) {
  constexpr int samples = 64;
  RemoteCache& remote = *engine.remote_cache();
  const Config& config = engine.config();
  const std::string where = remote.url().text();
  const Result<TrustedKeys> trusted = TrustedKeys::read(config.trusted_keys, Ownership::path);
  if (!trusted || trusted->keys.empty())
    report.add(remote.writes() ? Report::State::warn : Report::State::fail, "remote keys",
               fmt::format("{}: {}: nothing is taken from {}", config.trusted_keys,
                           trusted ? "lists no key" : trusted.status().message(), where));
  if (remote.writes()) {
    const bool trusts_itself = !trusted || trusted->contains(*remote.signer());
    report.add(trusts_itself ? Report::State::ok : Report::State::warn, "signing key",
               fmt::format("{}: kernels compiled here are written to {}{}", remote.signer()->id(), where,
                           trusts_itself ? "" : ", and are not trusted here"));
  } else if (!config.remote_signing_key.empty())
    report.fail("signing key", fmt::format("{} cannot be used: see the log", config.remote_signing_key));

  const Result<RemoteCache::Probe> probe = remote.probe(samples);
  if (!probe)
    return report.fail("remote cache", fmt::format("{}: {}", where, probe.status().message()));
  const double most_ms = remote.url().timeout_ms;
  report.add(probe->answer_ms < most_ms ? Report::State::ok : Report::State::warn, "remote cache",
             fmt::format("{}: answers in {:.2f} ms ({} are waited for), holds {}", where, probe->answer_ms,
                         remote.url().timeout_ms, count_text(probe->names, "name")));
  if (!probe->not_sampled.empty())
    return report.warn("remote kernels", fmt::format("not looked at: {}", probe->not_sampled));
  std::string text = fmt::format("{} of {} looked at would be refused", probe->refused.size(), probe->sampled);
  if (probe->other > 0)
    text += fmt::format(", {} are another version's", probe->other);
  for (const Status& why : probe->refused | std::views::take(3))
    text += fmt::format("; {}", why.message());
  report.add(probe->refused.empty() ? Report::State::ok : Report::State::warn, "remote kernels", text);
}

} // namespace kiln::cli
