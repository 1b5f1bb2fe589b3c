#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "api/cli/cache.h"
#include "api/cli/operands.h"
#include "api/cli/output.h"
#include "cache/bundle.h"
#include "cache/file.h"
#include "cache/signing.h"
#include "jit/kernel_key.h"

namespace kiln::cli {
namespace {

/// How long an import waits for others to be done with the cache.
constexpr std::chrono::seconds kImportPatience{5};

struct Options {
  std::string file;
  bool json = false;
  // export
  std::vector<std::string> ops;
  std::optional<std::string> target;
  std::string max_age, key;
  // import
  std::vector<std::string> trusted;
  bool allow_unsigned = false, dry_run = false;
  // keygen
  bool public_only = false;
};

/// Looks at rows without counting hits or removing bad ones: neither exporting nor importing is a use.
Result<std::unique_ptr<Store>> open_to_look(Engine& engine) {
  StoreOptions options;
  options.directory = engine.config().cache_dir;
  options.key_directory = engine.config().key_dir;
  options.mode = CacheMode::read_only;
  return Store::open(std::move(options), engine.log());
}

// ---------------------------------------------------------------- export

/// Seconds of `90s`, `45m`, `12h`, `30d` or `2w`.
Result<std::int64_t> parse_age(const std::string& text) {
  constexpr std::pair<char, std::int64_t> units[] = {{'s', 1}, {'m', 60}, {'h', 3600}, {'d', 86400}, {'w', 7 * 86400}};
  constexpr std::size_t most_digits = 9;
  const std::string digits = text.substr(0, text.find_first_not_of("0123456789"));
  for (const auto& [name, seconds] : units)
    if (!digits.empty() && digits.size() <= most_digits && text == digits + name)
      return std::stoll(digits) * seconds;
  return Status::error(Code::invalid_argument,
                       fmt::format("--max-age {}: allowed is a number of up to {} digits and a unit: s, m, h, d or w "
                                   "(30d)",
                                   text, most_digits));
}

/// Which kernels to export.
struct Filter {
  std::vector<std::string> ops;           ///< empty: every op
  std::optional<Target> target;           ///< a machine that must be able to run them
  std::int64_t created_after = INT64_MIN; ///< Unix seconds

  bool takes_all() const { return ops.empty() && !target && created_after == INT64_MIN; }
  bool takes(const StoreRow& row) const {
    if (!ops.empty() && std::find(ops.begin(), ops.end(), row.op) == ops.end())
      return false;
    if (row.created_at < created_after)
      return false;
    if (!target)
      return true;
    const Result<Target> needs = Target::parse(row.target);
    return needs && needs->arch == target->arch && target->features.contains(needs->features) &&
           (needs->sve_bits == 0 || needs->sve_bits == target->sve_bits) &&
           (needs->sme_bits == 0 || needs->sme_bits == target->sme_bits) && (needs->sm == 0 || needs->sm == target->sm);
  }
};

Result<Filter> filter_of(const Options& options) {
  Filter filter;
  filter.ops = options.ops;
  for (const std::string& op : options.ops)
    if (find_op(op) == nullptr)
      return Status::error(Code::invalid_argument, fmt::format("--op {}: known ops are {}", op, known_op_names()));
  const Result<std::optional<Target>> target = parse_target(options.target);
  if (!target)
    return target.status();
  filter.target = *target;
  if (!options.max_age.empty()) {
    const Result<std::int64_t> age = parse_age(options.max_age);
    if (!age)
      return age.status();
    filter.created_after = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now()) - *age;
  }
  return filter;
}

struct Selection {
  std::vector<StoreRow> rows;
  std::int64_t left_out = 0; ///< authentic rows whose key this version cannot confirm: another version made them
  std::int64_t refused = 0;  ///< rows that fail authentication
};

Result<Selection> select(Engine& engine, const Filter& filter) {
  const Result<std::unique_ptr<Store>> store = open_to_look(engine);
  if (!store)
    return store.status();
  const Result<std::vector<Store::Listed>> listed = (*store)->list();
  if (!listed)
    return listed.status();
  Selection out;
  for (const Store::Listed& one : *listed) {
    if (!filter.takes(one.row))
      continue;
    std::optional<StoreRow> row = (*store)->get(one.row.key);
    if (!row || !filter.takes(*row)) // the list was not authenticated
      continue;
    if (check_row(*row))
      out.rows.push_back(std::move(*row));
    else
      ++out.left_out;
  }
  const Result<StoreStats> stats = (*store)->stats();
  out.refused = stats ? stats->refused : 0;
  return out;
}

Result<Exit> export_bundle(Engine& engine, const Options& options, const Filter& filter, const SecretKey* key) {
  const Result<Selection> selection = select(engine, filter);
  if (!selection)
    return selection.status();
  if (selection->rows.empty())
    return Status::error(
        Code::not_found,
        fmt::format("{} has no kernel to export{}{}{}; nothing was written", engine.store()->path(),
                    filter.takes_all() ? "" : " that --op, --target and --max-age let through",
                    selection->left_out > 0 ? fmt::format("; {} of other versions", selection->left_out) : "",
                    selection->refused > 0 ? fmt::format("; {} that fail authentication", selection->refused) : ""));
  const Result<Bytes> bundle = make_bundle(selection->rows, key);
  if (!bundle)
    return bundle.status();
  // For others to read: it holds nothing secret.
  if (Status written = write_file_atomically(options.file, {*bundle}, 0644); !written)
    return written;
  const std::string signer = key != nullptr ? key->public_key().id() : "";
  if (options.json) {
    print_json({{"path", options.file},
                {"kernels", selection->rows.size()},
                {"bytes", bundle->size()},
                {"signed_by", signer.empty() ? Json() : Json(signer)},
                {"left_out", selection->left_out},
                {"refused", selection->refused}});
  } else {
    print_line(fmt::format("{}: {}, {}, {}", options.file, count_text(std::ssize(selection->rows), "kernel"),
                           bytes_text(std::ssize(*bundle)), signer.empty() ? "unsigned" : "signed by " + signer));
    if (selection->left_out > 0)
      print_line(fmt::format("left out: {} of other versions of Kiln", count_text(selection->left_out, "kernel")));
  }
  if (selection->refused > 0)
    report_error(fmt::format("{} failed authentication and left out: `kiln cache verify` removes them",
                             count_text(selection->refused, "kernel")));
  return selection->refused > 0 ? Exit::integrity : Exit::ok;
}

Result<Exit> run_export(const Options& options) {
  const Result<Filter> filter = filter_of(options);
  if (!filter)
    return filter.status();
  std::optional<Result<SecretKey>> key;
  if (!options.key.empty()) {
    key.emplace(SecretKey::load(options.key));
    if (!*key)
      return key->status();
  }
  return with_cache([&](Engine& engine) { return export_bundle(engine, options, *filter, key ? &**key : nullptr); });
}

// ---------------------------------------------------------------- import

struct Trusted {
  TrustedKeys keys;
  std::string places; ///< for messages
};

/// What --trusted names, else the list that every process reads.
Result<Trusted> trusted_keys(const Options& options, const Config& config) {
  Trusted out;
  for (const std::string& place : options.trusted) {
    const Result<TrustedKeys> keys = TrustedKeys::read(place, Ownership::file);
    if (!keys)
      return keys.status();
    out.keys.add(*keys);
    out.places += (out.places.empty() ? "" : ", ") + place;
  }
  if (!options.trusted.empty())
    return out;
  const Result<TrustedKeys> keys = TrustedKeys::read(config.trusted_keys, Ownership::path);
  if (!keys && keys.status().code() != Code::not_found)
    return keys.status();
  if (keys)
    out.keys = *keys;
  out.places = config.trusted_keys + (keys ? "" : ", which does not exist");
  return out;
}

/// Ok when the bundle's origin is one that this user has named.
Status check_signer(const Bundle& bundle, const Trusted& trusted) {
  if (!bundle.signer())
    return Status::error(Code::integrity,
                         fmt::format("{} is unsigned: nothing tells who made it; --allow-unsigned takes "
                                     "it all the same",
                                     bundle.path()));
  if (!trusted.keys.contains(*bundle.signer()))
    return Status::error(
        Code::integrity,
        fmt::format("{} is signed by key {}, which is none of the {} trusted here ({}): --trusted names "
                    "others, --allow-unsigned takes it all the same",
                    bundle.path(), bundle.signer()->id(), trusted.keys.keys.size(), trusted.places));
  return {};
}

/// All of the bundle's kernels, each checked; none when one is bad.
Result<std::vector<StoreRow>> read_all(const Bundle& bundle) {
  std::vector<StoreRow> rows;
  for (const Bundle::Entry& entry : bundle.entries()) {
    Result<StoreRow> row = bundle.read(entry);
    if (!row)
      return row.status();
    if (const Status status = check_row(*row); !status)
      return Status::error(status.code(), fmt::format("{}: {}", bundle.path(), status.message()));
    rows.push_back(std::move(*row));
  }
  return rows;
}

/// Those that the cache does not hold yet, authentic.
Result<std::vector<StoreRow>> missing(Engine& engine, std::vector<StoreRow> rows) {
  const Result<std::unique_ptr<Store>> store = open_to_look(engine);
  if (!store)
    return store.status();
  std::erase_if(rows, [&](const StoreRow& row) { return (*store)->get(row.key).has_value(); });
  return rows;
}

Status put_all(Store& store, const std::vector<StoreRow>& rows) {
  const auto give_up = std::chrono::steady_clock::now() + kImportPatience;
  Status status = store.put_all(rows);
  while (status.code() == Code::busy && std::chrono::steady_clock::now() < give_up)
    status = store.put_all(rows);
  return status;
}

Result<Exit> import_bundle(Engine& engine, const Options& options) {
  if (engine.config().cache != CacheMode::read_write && !options.dry_run)
    return Status::error(Code::unsupported, "import needs a cache on disk that may be written: KILN_CACHE is not rw");
  const Result<Trusted> trusted = trusted_keys(options, engine.config());
  if (!trusted)
    return trusted.status();
  Result<FileDescriptor> file = open_for_reading(options.file, Ownership::any);
  if (!file)
    return file.status();
  const Result<Bundle> bundle = Bundle::open(std::move(*file), options.file);
  if (!bundle)
    return bundle.status();
  const Status trust = check_signer(*bundle, *trusted);
  if (!trust && !options.allow_unsigned)
    return trust;
  Result<std::vector<StoreRow>> rows = read_all(*bundle);
  if (!rows)
    return rows.status();
  const std::size_t kernels = rows->size();
  const Result<std::vector<StoreRow>> added = missing(engine, std::move(*rows));
  if (!added)
    return added.status();
  if (!options.dry_run)
    if (Status status = put_all(*engine.store(), *added); !status)
      return Status::error(status.code(), fmt::format("{}: nothing was imported: {}", options.file, status.message()));

  const std::string signer = bundle->signer() ? bundle->signer()->id() : "";
  if (options.json)
    print_json({{"path", options.file},
                {"kernels", kernels},
                {"added", added->size()},
                {"present", kernels - added->size()},
                {"signed_by", signer.empty() ? Json() : Json(signer)},
                {"trusted", trust.is_ok()},
                {"dry_run", options.dry_run}});
  else
    print_line(fmt::format(
        "{}: {}, {}; {} {}, {} there already", options.file, count_text(static_cast<std::int64_t>(kernels), "kernel"),
        signer.empty() ? "unsigned" : fmt::format("signed by {}{}", signer, trust ? "" : " (not trusted)"),
        options.dry_run ? "would add" : "added", added->size(), kernels - added->size()));
  return Exit::ok;
}

// ---------------------------------------------------------------- keygen

Result<Exit> run_keygen(const Options& options) {
  const Result<SecretKey> key = options.public_only ? SecretKey::load(options.file) : SecretKey::generate();
  if (!key)
    return key.status();
  if (!options.public_only)
    if (Status saved = key->save(options.file); !saved)
      return saved;
  const PublicKey public_key = key->public_key();
  if (options.json)
    print_json({{"path", options.file}, {"id", public_key.id()}, {"public_key", public_key.line()}});
  else
    print_line(public_key.line());
  return Exit::ok;
}

} // namespace

std::vector<Command> bundle_commands(Arguments cache) {
  const auto options = std::make_shared<Options>();
  const Arguments to_file = cache.add_command("export", "Write kernels to a bundle, a file for other machines");
  to_file.required_word("FILE", options->file, "The bundle; one that is there is replaced");
  to_file.option("--op", options->ops, "Only kernels of this op; may be repeated");
  to_file.option("--target", options->target,
                 "Only kernels that this machine runs: what its `kiln info --target` "
                 "prints, or a name that `kiln info` lists");
  to_file.option("--max-age", options->max_age, "Only kernels compiled or imported within it: 90s, 45m, 12h, 30d, 2w");
  to_file.option("--key", options->key, "Sign with this secret key (of `kiln cache keygen`)");

  const Arguments from_file = cache.add_command("import", "Take the kernels of a bundle into the cache, all or none");
  from_file.required_word("FILE", options->file, "The bundle");
  from_file.option("--trusted", options->trusted,
                   "Keys to trust instead of KILN_TRUSTED_KEYS: a file of public keys, or a directory of NAME.pub; may "
                   "be repeated");
  from_file.flag("--allow-unsigned", options->allow_unsigned, "Also take what no trusted key signed");
  from_file.flag("--dry-run", options->dry_run, "Check everything, change nothing");

  const Arguments keygen = cache.add_command("keygen", "Make a key to sign bundles with, and print its public key");
  keygen.required_word("FILE", options->file, "Where the secret key goes: a new file, closed to others");
  keygen.flag("--public", options->public_only, "Make nothing; print the public key of the secret key FILE");

  for (const Arguments arguments : {to_file, from_file, keygen})
    arguments.flag("--json", options->json, "Print one JSON object");
  return {
      {to_file, [options] { return run_export(*options); }},
      {from_file, [options] { return with_cache([&](Engine& engine) { return import_bundle(engine, *options); }); }},
      {keygen, [options] { return run_keygen(*options); }}};
}

} // namespace kiln::cli
