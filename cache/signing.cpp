#include "cache/signing.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fmt/format.h>
#include <optional>
#include <set>
#include <sodium.h>

#include "cache/digest.h"
#include "cache/file.h"
#include "cache/random.h"

namespace kiln {
namespace {

constexpr std::string_view algorithm = "ed25519";
constexpr std::string_view secret_word = "kiln-secret-key";
constexpr std::size_t most_key_file_bytes = 1 << 10;
constexpr std::size_t most_trusted_file_bytes = 1 << 20;
constexpr int base64 = sodium_base64_VARIANT_ORIGINAL;

static_assert(sizeof(PublicKey) == crypto_sign_PUBLICKEYBYTES);
static_assert(sizeof(Signature) == crypto_sign_BYTES);

std::string base64_of(std::span<const std::uint8_t, 32> bytes) {
  char text[sodium_base64_ENCODED_LEN(32, base64)];
  sodium_bin2base64(text, sizeof text, bytes.data(), bytes.size(), base64);
  std::string out = text;
  sodium_memzero(text, sizeof text);
  return out;
}

/// Exactly 32 bytes in their one base64 form.
bool decode(std::string_view text, std::array<std::uint8_t, 32>& out) {
  std::size_t size = 0;
  const char* end = nullptr;
  return sodium_base642bin(out.data(), out.size(), text.data(), text.size(), nullptr, &size, &end, base64) == 0 &&
         size == out.size() && end == text.data() + text.size();
}

/// Cuts the next word off.
std::string_view next_word(std::string_view& text) {
  constexpr std::string_view spaces = " \t\r\n";
  text.remove_prefix(std::min(text.find_first_not_of(spaces), text.size()));
  const std::string_view word = text.substr(0, text.find_first_of(spaces));
  text.remove_prefix(word.size());
  return word;
}

Status not_a_key(std::string why) {
  return Status::error(
      Code::invalid_argument,
      fmt::format("no public key: {}; needed is a line `{} ID BASE64`, as `kiln cache keygen` prints it",
                  std::move(why), algorithm));
}

/// The keys of its files NAME.pub. Who may write the directory may add a key.
Result<TrustedKeys> read_directory(const std::string& directory) {
  if (Status status = check_trusted_directory(directory); !status)
    return status;
  std::error_code error;
  std::set<std::string> files; // in an order of their own: the first bad one is always the same
  for (std::filesystem::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error))
    if (entry->path().extension() == ".pub")
      files.insert(entry->path().string());
  if (error)
    return Status::error(Code::io, fmt::format("{}: cannot list the directory: {}", directory, error.message()));
  TrustedKeys out;
  for (const std::string& file : files) {
    const Result<TrustedKeys> keys = TrustedKeys::read(file, Ownership::file);
    if (!keys)
      return keys.status();
    out.add(*keys);
  }
  return out;
}

/// What others wrote, fit for a message.
std::string shown(std::string_view text) {
  constexpr std::size_t most = 32;
  std::string out;
  for (const char c : text.substr(0, most))
    out += c >= 0x20 && c < 0x7f ? c : '?';
  return text.size() > most ? out + "…" : out;
}

} // namespace

std::string PublicKey::id() const {
  return digest_of(bytes).hex().substr(0, 16);
}

std::string PublicKey::line() const {
  return fmt::format("{} {} {}", algorithm, id(), base64_of(bytes));
}

Result<PublicKey> PublicKey::parse(std::string_view line) {
  std::string_view rest = line;
  const std::string_view kind = next_word(rest), id = next_word(rest), text = next_word(rest);
  if (kind == secret_word)
    return Status::error(Code::invalid_argument, "a secret key stands where a public one is needed; `kiln cache keygen "
                                                 "--public` prints its public key");
  if (kind != algorithm)
    return not_a_key(fmt::format("it begins with '{}'", shown(kind)));
  PublicKey key;
  if (!decode(text, key.bytes))
    return not_a_key(fmt::format("'{}' is not the base64 of 32 bytes", shown(text)));
  // Of other points some have signatures that fit many messages.
  if (crypto_core_ed25519_is_valid_point(key.bytes.data()) != 1)
    return not_a_key("its bytes are no point of the curve's prime-order group");
  if (id != key.id())
    return not_a_key(fmt::format("its id '{}' is not that of its bytes, {}", shown(id), key.id()));
  return key;
}

bool is_signed_by(const PublicKey& key, ByteSpan message, const Signature& signature) {
  return crypto_sign_verify_detached(signature.data(), message.data(), message.size(), key.bytes.data()) == 0;
}

SecretKey SecretKey::from_seed(std::span<const std::uint8_t, 32> seed) {
  SecretKey key;
  PublicKey unused;
  crypto_sign_seed_keypair(unused.bytes.data(), key.bytes_.data(), seed.data());
  return key;
}

SecretKey::SecretKey(SecretKey&& other) noexcept : bytes_(other.bytes_) {
  sodium_memzero(other.bytes_.data(), other.bytes_.size());
}

SecretKey::~SecretKey() {
  sodium_memzero(bytes_.data(), bytes_.size());
}

Result<SecretKey> SecretKey::generate() {
  Result<Digest> seed = random_digest();
  if (!seed)
    return seed.status();
  SecretKey key = from_seed(seed->bytes);
  sodium_memzero(seed->bytes.data(), seed->bytes.size());
  return key;
}

Result<SecretKey> SecretKey::load(const std::string& path) {
  const Result<FileDescriptor> file = open_for_reading(path, Ownership::secret);
  if (!file)
    return file.status();
  Result<Bytes> content = read_whole(*file, path, most_key_file_bytes);
  if (!content)
    return content.status();
  std::string_view rest(reinterpret_cast<const char*>(content->data()), content->size());
  const std::string_view word = next_word(rest), kind = next_word(rest), id = next_word(rest), text = next_word(rest);
  std::array<std::uint8_t, 32> seed{};
  std::optional<SecretKey> key;
  if (word == secret_word && kind == algorithm && decode(text, seed) && next_word(rest).empty())
    key.emplace(from_seed(seed));
  const bool is_key = key && key->public_key().id() == id;
  sodium_memzero(seed.data(), seed.size());
  sodium_memzero(content->data(), content->size());
  if (!is_key)
    return Status::error(Code::integrity, fmt::format("{}: no secret key of `kiln cache keygen`", path));
  return std::move(*key);
}

Status SecretKey::save(const std::string& path) const {
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (file < 0) {
    const int error = errno;
    return Status::error(
        Code::io, error == EEXIST ? fmt::format("{}: there is a file already, and a key is never overwritten", path)
                                  : fmt::format("{}: cannot make the file: {}", path, std::strerror(error)));
  }
  std::string text = fmt::format("{} {} {} {}\n", secret_word, algorithm, public_key().id(),
                                 base64_of(std::span<const std::uint8_t, 32>(bytes_.data(), 32)));
  bool written = write_all(file, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  sodium_memzero(text.data(), text.size());
  written = written && ::fsync(file) == 0;
  const int error = errno;
  ::close(file);
  if (written)
    return {};
  ::unlink(path.c_str());
  return Status::error(Code::io, fmt::format("{}: cannot write: {}", path, std::strerror(error)));
}

PublicKey SecretKey::public_key() const {
  PublicKey key;
  std::copy_n(bytes_.begin() + 32, 32, key.bytes.begin());
  return key;
}

Signature SecretKey::sign(ByteSpan message) const {
  Signature signature;
  crypto_sign_detached(signature.data(), nullptr, message.data(), message.size(), bytes_.data());
  return signature;
}

bool TrustedKeys::contains(const PublicKey& key) const {
  return std::find(keys.begin(), keys.end(), key) != keys.end();
}

void TrustedKeys::add(const TrustedKeys& more) {
  for (const PublicKey& key : more.keys)
    if (!contains(key))
      keys.push_back(key);
}

Result<TrustedKeys> TrustedKeys::read(const std::string& path, Ownership ownership) {
  struct stat info;
  if (ownership == Ownership::file && ::stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode))
    return read_directory(path);
  const Result<FileDescriptor> file = open_for_reading(path, ownership);
  if (!file)
    return file.status();
  const Result<Bytes> content = read_whole(*file, path, most_trusted_file_bytes);
  if (!content)
    return content.status();
  TrustedKeys out;
  std::string_view rest(reinterpret_cast<const char*>(content->data()), content->size());
  for (int number = 1; !rest.empty(); ++number) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(line.size() + 1, rest.size()));
    std::string_view words = line;
    const std::string_view first = next_word(words);
    if (first.empty() || first.starts_with('#'))
      continue;
    const Result<PublicKey> key = PublicKey::parse(line);
    if (!key)
      return Status::error(key.status().code(), fmt::format("{}:{}: {}", path, number, key.status().message()));
    out.add({{*key}});
  }
  return out;
}

} // namespace kiln
