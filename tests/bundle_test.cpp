#include <algorithm>
#include <filesystem>
#include <fstream>
#include <random>

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <doctest/doctest.h>
#include <fmt/format.h>
#include <zstd.h>

#include "cache/bundle.h"
#include "cache/entry.h"

using namespace kiln;
namespace fs = std::filesystem;

namespace {

constexpr std::size_t header_bytes = 50, index_entry_bytes = 72; // api/doc/bundle.md

struct Folder {
  Folder() {
    std::string pattern = (fs::temp_directory_path() / "kiln_bundle_test.XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path = fs::canonical(pattern);
  }
  ~Folder() { fs::remove_all(path); }
  std::string operator/(const std::string& name) const { return (path / name).string(); }
  fs::path path;
};

void write(const std::string& path, ByteSpan content, mode_t mode = 0600) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(content.data()), static_cast<long>(content.size()));
  REQUIRE(::chmod(path.c_str(), mode) == 0);
}

void write(const std::string& path, std::string_view text, mode_t mode = 0600) {
  write(path, ByteSpan(reinterpret_cast<const std::uint8_t*>(text.data()), text.size()), mode);
}

StoreRow row_of(std::uint64_t number, std::size_t code_bytes = 60) {
  Writer writer;
  writer.u64(number);
  StoreRow row;
  row.key = digest_of(writer.bytes());
  row.op = "int8_mm";
  row.desc = fmt::format("int8_mm m=1 n=4096 k={}", number);
  row.isa = "avx2";
  row.target = "x86_64:avx2";
  row.generator = std::string(64, 'a');
  std::mt19937_64 random(number);
  row.code.resize(code_bytes);
  for (std::uint8_t& byte : row.code)
    byte = static_cast<std::uint8_t>(random());
  row.compile_us = static_cast<std::int64_t>(number);
  row.created_at = 1'700'000'000 + static_cast<std::int64_t>(number);
  return row;
}

std::vector<StoreRow> rows_of(int count) {
  std::vector<StoreRow> rows;
  for (int i = 0; i < count; ++i)
    rows.push_back(row_of(static_cast<std::uint64_t>(i)));
  return rows;
}

SecretKey new_key() {
  Result<SecretKey> key = SecretKey::generate();
  REQUIRE(key);
  return std::move(*key);
}

Bytes bundle_of(std::span<const StoreRow> rows, const SecretKey* key = nullptr) {
  const Result<Bytes> bundle = make_bundle(rows, key);
  REQUIRE_MESSAGE(bundle, bundle.status().message());
  return *bundle;
}

/// What a reader that takes everything gets: all rows, or why there are none.
Result<std::vector<StoreRow>> read_bundle(ByteSpan bytes) {
  FileDescriptor file(::memfd_create("bundle", MFD_CLOEXEC));
  REQUIRE(::write(file.get(), bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  const Result<Bundle> bundle = Bundle::open(std::move(file), "the-bundle");
  if (!bundle)
    return bundle.status();
  std::vector<StoreRow> rows;
  for (const Bundle::Entry& entry : bundle->entries()) {
    Result<StoreRow> row = bundle->read(entry);
    if (!row)
      return row.status();
    rows.push_back(std::move(*row));
  }
  return rows;
}

void check_refused(ByteSpan bytes, std::string_view says, Code code = Code::integrity) {
  const Result<std::vector<StoreRow>> rows = read_bundle(bytes);
  REQUIRE_MESSAGE(!rows, "accepted, where '", says, "' was expected");
  INFO(rows.status().message());
  CHECK(rows.status().code() == code);
  CHECK(rows.status().message().find(says) != std::string::npos);
  CHECK(rows.status().message().find("the-bundle") != std::string::npos);
}

/// Makes an unsigned bundle's digest right again, as anybody can.
Bytes resealed(Bytes bundle, std::size_t entries) {
  const std::size_t end = header_bytes + entries * index_entry_bytes;
  const Digest digest = digest_of(ByteSpan(bundle).first(end));
  std::copy(digest.bytes.begin(), digest.bytes.end(), bundle.begin() + static_cast<long>(end));
  return bundle;
}

/// An unsigned bundle of one entry with these stored bytes, which claims this size.
Bytes forged(ByteSpan stored, std::uint32_t claimed_bytes) {
  Writer out;
  out.raw(ByteSpan(bundle_of(rows_of(1))).first(header_bytes));
  out.raw(row_of(0).key.bytes);
  out.raw(digest_of(stored).bytes);
  out.u32(static_cast<std::uint32_t>(stored.size()));
  out.u32(claimed_bytes);
  out.raw(Digest().bytes);
  out.raw(stored);
  return resealed(out.take(), 1);
}

Bytes frame_of(ByteSpan plain) {
  Bytes out(ZSTD_compressBound(plain.size()));
  out.resize(ZSTD_compress(out.data(), out.size(), plain.data(), plain.size(), 1));
  return out;
}

Bytes columns(const std::vector<std::string>& texts, ByteSpan code) {
  Writer writer;
  for (const std::string& text : texts)
    writer.string(text);
  writer.blob(code);
  return writer.take();
}

} // namespace

TEST_CASE("bundle: rows come back without times; the bytes depend on nothing else") {
  const SecretKey key = new_key();
  std::vector<StoreRow> rows = rows_of(20);
  rows.push_back(row_of(100, 3 << 20));
  const Bytes signed_bundle = bundle_of(rows, &key), unsigned_bundle = bundle_of(rows);
  CHECK(signed_bundle.size() == unsigned_bundle.size() + sizeof(Signature) - sizeof(Digest));

  std::vector<StoreRow> shuffled = rows;
  std::shuffle(shuffled.begin(), shuffled.end(), std::mt19937(1));
  for (StoreRow& row : shuffled) {
    row.created_at += 7;
    row.compile_us += 1;
    row.hits = 3;
    row.last_hit_at = 9;
  }
  CHECK(bundle_of(shuffled, &key) == signed_bundle);
  CHECK(bundle_of(shuffled) == unsigned_bundle);

  for (const Bytes* bundle : {&signed_bundle, &unsigned_bundle}) {
    const Result<std::vector<StoreRow>> back = read_bundle(*bundle);
    REQUIRE(back);
    REQUIRE(back->size() == rows.size());
    for (const StoreRow& row : rows) {
      const auto found =
          std::find_if(back->begin(), back->end(), [&](const StoreRow& other) { return other.key == row.key; });
      REQUIRE(found != back->end());
      CHECK((found->op == row.op && found->desc == row.desc && found->isa == row.isa && found->target == row.target &&
             found->generator == row.generator && found->code == row.code));
      CHECK((found->created_at == 0 && found->compile_us == 0 && found->hits == 0 && found->last_hit_at == 0));
    }
  }

  const Folder folder;
  write(folder / "bundle", unsigned_bundle);
  Result<FileDescriptor> file = open_for_reading(folder / "bundle", Ownership::any);
  REQUIRE(file);
  const Result<Bundle> bundle = Bundle::open(std::move(*file), "bundle");
  REQUIRE(bundle);
  CHECK(!bundle->signer());
  REQUIRE(bundle->find(row_of(7).key) != nullptr);
  CHECK(bundle->read(*bundle->find(row_of(7).key))->code == row_of(7).code);
  CHECK(bundle->find(row_of(999).key) == nullptr);
}

TEST_CASE("bundle: what cannot be one is not made") {
  const auto refused = [](const std::vector<StoreRow>& rows, std::string_view says) {
    const Result<Bytes> bundle = make_bundle(rows, nullptr);
    REQUIRE(!bundle);
    INFO(bundle.status().message());
    CHECK(bundle.status().code() == Code::invalid_argument);
    CHECK(bundle.status().message().find(says) != std::string::npos);
  };
  refused({}, "0 kernels");
  refused({row_of(1), row_of(2), row_of(1)}, "given twice");
  StoreRow row = row_of(1);
  row.desc = "a\nb";
  refused({row}, "its desc has characters");
  row.desc = std::string(EntryLimits::text_bytes + 1, 'x');
  refused({row}, "its desc has 4097 bytes");
  row = row_of(1);
  row.isa = "";
  refused({row}, "its isa has 0 bytes");
  row = row_of(1);
  row.code.assign(BundleLimits::entry_bytes, 0);
  refused({row}, "allowed are 67108864");
}

TEST_CASE("bundle: every bit counts") {
  const SecretKey key = new_key();
  for (const SecretKey* with : {static_cast<const SecretKey*>(nullptr), &key}) {
    const Bytes good = bundle_of(rows_of(2), with);
    REQUIRE(read_bundle(good));
    int accepted = 0;
    for (std::size_t bit = 0; bit < 8 * good.size(); ++bit) {
      Bytes bad = good;
      bad[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
      accepted += read_bundle(bad).is_ok();
    }
    CHECK(accepted == 0);
    for (std::size_t size = 0; size < good.size(); ++size)
      accepted += read_bundle(ByteSpan(good).first(size)).is_ok();
    CHECK(accepted == 0);
    Bytes longer = good;
    longer.push_back(0);
    check_refused(longer, "something follows its end");
    longer.resize(2 * good.size());
    check_refused(longer, "something follows its end");
  }
}

TEST_CASE("bundle: parts of two bundles of one signer are no bundle") {
  const SecretKey key = new_key(), other = new_key();
  const std::vector<StoreRow> rows = rows_of(2);
  std::vector<StoreRow> changed = rows;
  changed[0].code[5] ^= 1;
  const Bytes a = bundle_of(rows, &key), b = bundle_of(changed, &key), c = bundle_of(rows, &other);
  REQUIRE(a.size() == b.size());
  const std::size_t index_end = header_bytes + 2 * index_entry_bytes, front = index_end + sizeof(Signature);
  const auto joined = [](const Bytes& left, const Bytes& right, std::size_t at) {
    Bytes out(left.begin(), left.begin() + static_cast<long>(at));
    out.insert(out.end(), right.begin() + static_cast<long>(at), right.end());
    return out;
  };
  check_refused(joined(a, b, front), "digest is wrong");             // a's index, b's entries
  check_refused(joined(a, b, index_end), "the signature is not");    // a's index, b's signature
  CHECK(joined(a, b, header_bytes) == b);                            // the same header
  check_refused(joined(c, a, header_bytes), "the signature is not"); // c's key, a's signature
}

TEST_CASE("bundle: anybody can seal an unsigned one, so nothing in it is believed") {
  const Bytes good = bundle_of(rows_of(3));
  REQUIRE(read_bundle(resealed(good, 3)));
  const auto with = [&](std::size_t at, std::initializer_list<std::uint8_t> bytes) {
    Bytes out = good;
    std::copy(bytes.begin(), bytes.end(), out.begin() + static_cast<long>(at));
    return resealed(out, 3);
  };
  check_refused(with(8, {2}), "format version 2; this version of Kiln reads 1", Code::unsupported);
  check_refused(with(12, {0}), "compression 0; allowed is 1");
  check_refused(with(13, {2}), "authentication 2; allowed are 0");
  check_refused(with(14, {0, 0, 0, 0}), "0 entries");
  check_refused(with(14, {0xff, 0xff, 0xff, 0xff}), "4294967295 entries");
  check_refused(with(14, {0xa0, 0x86, 0x01, 0}), "cut short"); // 100000, in a file of three
  check_refused(with(18, {1}), "unsigned, and yet names a key");
  check_refused(with(header_bytes + 68, {1, 0, 0, 4}), "allowed are 67108864");
  check_refused(with(header_bytes + 64, {0xff, 0xff, 0xff, 0xff}), "compressed");
  check_refused(with(header_bytes, {0xff, 0xff, 0xff}), "not in the order of keys");

  Bytes twice = good; // the second key is the first's
  std::copy_n(good.begin() + header_bytes, 32, twice.begin() + header_bytes + index_entry_bytes);
  check_refused(resealed(twice, 3), "not in the order of keys");
}

TEST_CASE("bundle: an entry is one zstd frame of the size claimed, and columns that fill it") {
  const std::string generator(64, 'a');
  const Bytes code(40, 7);
  const Bytes plain = columns({"int8_mm", "int8_mm m=1", "avx2", "x86_64:avx2", generator}, code);
  const auto size = static_cast<std::uint32_t>(plain.size());
  const Bytes frame = frame_of(plain);
  REQUIRE(read_bundle(forged(frame, size)));

  const auto one_frame = "not one zstd frame of the size";
  check_refused(forged(frame, size + 1), one_frame);
  check_refused(forged(frame, size - 1), one_frame);
  const Bytes bomb = frame_of(Bytes(50 << 20, 0));
  REQUIRE(bomb.size() < 64 << 10);
  check_refused(forged(bomb, 100'000), one_frame);
  Bytes two = frame;
  two.insert(two.end(), frame.begin(), frame.end());
  check_refused(forged(two, size), one_frame);
  check_refused(forged(Bytes(20, 0x5a), 20), one_frame);
  check_refused(forged({}, 0), one_frame);

  Bytes no_size(ZSTD_compressBound(plain.size())); // a frame that does not tell
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_contentSizeFlag, 0);
  no_size.resize(ZSTD_compress2(context, no_size.data(), no_size.size(), plain.data(), plain.size()));
  ZSTD_freeCCtx(context);
  check_refused(forged(no_size, size), one_frame);
  Bytes liar = frame; // the frame's header agrees with the index, its blocks hold less
  REQUIRE(liar[5] == size);
  liar[5] = static_cast<std::uint8_t>(size + 1);
  check_refused(forged(liar, size + 1), "cannot be decompressed");

  const auto with_columns = [&](const Bytes& bytes) {
    return forged(frame_of(bytes), static_cast<std::uint32_t>(bytes.size()));
  };
  Bytes more = plain;
  more.push_back(0);
  check_refused(with_columns(more), "do not fill it");
  check_refused(with_columns(Bytes(plain.begin(), plain.end() - 1)), "do not fill it");
  check_refused(with_columns(Bytes(8, 0xff)), "do not fill it");
  check_refused(with_columns(columns({"int8_mm", "a\x1b[2J", "avx2", "x", generator}, code)), "printable");
  check_refused(with_columns(columns({"", "x", "avx2", "x", generator}, code)), "its op has 0 bytes");
}

TEST_CASE("keys: made once, closed to others, read back") {
  const Folder folder;
  const SecretKey key = new_key();
  const std::string path = folder / "secret";
  REQUIRE(key.save(path));
  struct stat info;
  REQUIRE(::stat(path.c_str(), &info) == 0);
  CHECK((info.st_mode & 07777) == 0600);
  CHECK(key.save(path).message().find("never overwritten") != std::string::npos);
  fs::create_symlink(folder / "elsewhere", folder.path / "link");
  CHECK(!key.save(folder / "link"));
  CHECK(!fs::exists(folder / "elsewhere"));

  Result<SecretKey> loaded = SecretKey::load(path);
  REQUIRE(loaded);
  CHECK(loaded->public_key() == key.public_key());
  const Bytes message = {1, 2, 3};
  CHECK(loaded->sign(message) == key.sign(message));
  CHECK(is_signed_by(key.public_key(), message, key.sign(message)));
  CHECK(!is_signed_by(key.public_key(), Bytes{1, 2, 4}, key.sign(message)));
  CHECK(!is_signed_by(new_key().public_key(), message, key.sign(message)));

  REQUIRE(::chmod(path.c_str(), 0640) == 0);
  CHECK(SecretKey::load(path).status().message().find("0640") != std::string::npos);
  for (const std::string& bad :
       {std::string(), key.public_key().line(), std::string("kiln-secret-key ed25519"), std::string(2000, 'x')}) {
    write(path, bad);
    CHECK(SecretKey::load(path).status().code() == Code::integrity);
  }
}

TEST_CASE("keys: RFC 8032, section 7.1, test 2") {
  const auto from_hex = [](std::string_view text) {
    Bytes out;
    for (std::size_t i = 0; i < text.size(); i += 2)
      out.push_back(static_cast<std::uint8_t>(std::stoi(std::string(text.substr(i, 2)), nullptr, 16)));
    return out;
  };
  PublicKey key;
  const Bytes key_bytes = from_hex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c");
  std::copy(key_bytes.begin(), key_bytes.end(), key.bytes.begin());
  Signature signature;
  const Bytes signature_bytes = from_hex("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
                                         "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00");
  std::copy(signature_bytes.begin(), signature_bytes.end(), signature.begin());
  CHECK(is_signed_by(key, Bytes{0x72}, signature));
  CHECK(!is_signed_by(key, Bytes{0x73}, signature));
}

TEST_CASE("keys: a public key is one line, with its id") {
  const PublicKey key = new_key().public_key();
  REQUIRE(PublicKey::parse(key.line()));
  CHECK(*PublicKey::parse(key.line() + " team@example.org, 2026\r") == key);
  const std::string base64 = key.line().substr(key.line().rfind(' ') + 1);
  const PublicKey small_order; // all zero: a point of order 4
  for (const std::string& bad :
       {std::string(), std::string("ed25519"), "rsa " + key.id() + " " + base64, "ed25519 " + base64,
        "ed25519 " + key.id() + " " + base64.substr(1), "ed25519 " + key.id() + " " + base64 + "=",
        "ed25519 " + new_key().public_key().id() + " " + base64, small_order.line(), "kiln-secret-key " + key.line()}) {
    INFO(bad);
    CHECK(PublicKey::parse(bad).status().code() == Code::invalid_argument);
  }
}

TEST_CASE("trusted keys: lists, directories, and who may write them") {
  const Folder folder;
  const PublicKey a = new_key().public_key(), b = new_key().public_key();
  const std::string list = folder / "list";
  write(list, fmt::format("# of the team\n\n{}\n  {}  a comment\n{}", a.line(), b.line(), a.line()));
  for (const Ownership ownership : {Ownership::file, Ownership::path}) {
    const Result<TrustedKeys> keys = TrustedKeys::read(list, ownership);
    REQUIRE_MESSAGE(keys, keys.status().message());
    CHECK(keys->keys == std::vector{a, b});
    CHECK(!keys->contains(new_key().public_key()));
  }
  write(list, fmt::format("{}\nnonsense\x1b\n", a.line()));
  CHECK(TrustedKeys::read(list, Ownership::file)
            .status()
            .message()
            .starts_with(list + ":2: no public key: it begins "
                                "with 'nonsense?'"));
  write(list, a.line(), 0666);
  CHECK(TrustedKeys::read(list, Ownership::file).status().message().find("0666") != std::string::npos);
  CHECK(TrustedKeys::read(folder / "none", Ownership::path).status().code() == Code::not_found);

  fs::create_directory(folder.path / "keys");
  write(folder / "keys/a.pub", a.line());
  write(folder / "keys/b.pub", b.line());
  write(folder / "keys/README", "not a key");
  CHECK(TrustedKeys::read(folder / "keys", Ownership::file)->keys == std::vector{a, b});
  CHECK(!TrustedKeys::read(folder / "keys", Ownership::path));
  fs::permissions(folder.path / "keys", fs::perms::all);
  CHECK(TrustedKeys::read(folder / "keys", Ownership::file).status().message().find("0777") != std::string::npos);
}

TEST_CASE("trusted files: every directory above counts, and links are followed where nobody else can have made them") {
  const Folder folder;
  fs::create_directories(folder.path / "a/b");
  const std::string path = folder / "a/b/file";
  write(path, "x", 0644);
  const auto says = [](const std::string& file) {
    const Result<FileDescriptor> opened = open_for_reading(file, Ownership::path);
    return opened ? std::string("opened") : opened.status().message();
  };
  const auto mentions = [](const std::string& text, const std::string& part) {
    INFO(text);
    CHECK(text.find(part) != std::string::npos);
  };
  CHECK(says(path) == "opened");
  CHECK(says(folder / "a/./b/../b/file") == "opened");
  REQUIRE(::chmod((folder / "a").c_str(), 0775) == 0);
  mentions(says(path), (folder / "a") + " is not trusted");
  REQUIRE(::chmod((folder / "a").c_str(), 01777) == 0); // as /tmp is
  CHECK(says(path) == "opened");
  REQUIRE(::chmod((folder / "a/b").c_str(), 01777) == 0); // but not the last one
  mentions(says(path), (folder / "a/b") + " is not trusted");
  for (const char* part : {"a", "a/b"})
    REQUIRE(::chmod((folder / part).c_str(), 0755) == 0);
  REQUIRE(::chmod(path.c_str(), 0664) == 0);
  mentions(says(path), "0664");
  REQUIRE(::chmod(path.c_str(), 0644) == 0);

  fs::create_directory_symlink(folder.path / "a", folder.path / "to_a");
  CHECK(says(folder / "to_a/b/file") == "opened");
  fs::create_directory_symlink("b", folder.path / "a/to_b"); // the last directory is none
  mentions(says(folder / "a/to_b/file"), (folder / "a/to_b") + " is not trusted: it is a symbolic link");
  fs::create_symlink(path, folder.path / "a/b/to_file");
  mentions(says(folder / "a/b/to_file"), "is a symbolic link");
  REQUIRE(::mkfifo((folder / "a/b/fifo").c_str(), 0600) == 0);
  mentions(says(folder / "a/b/fifo"), "not a regular file");
  mentions(says(folder / "a/b"), "not a regular file");
  mentions(says("/dev/null"), "not a regular file");
  CHECK(open_for_reading(folder / "a/none/file", Ownership::path).status().code() == Code::not_found);
  if (::geteuid() == 0) {
    REQUIRE(::chown((folder / "a/b").c_str(), 12345, 12345) == 0);
    mentions(says(path), "uid 12345");
  }
}
