#include <thread>

#include <doctest/doctest.h>

#include "cache/bytes.h"
#include "cache/digest.h"
#include "cache/log.h"
#include "cache/readable.h"
#include "cache/status.h"

using namespace kiln;

namespace {

ByteSpan bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

struct Message {
  LogLevel level;
  std::string text;
};

void collect(void* context, LogLevel level, const char* message) {
  static_cast<std::vector<Message>*>(context)->push_back({level, message});
}

} // namespace

TEST_CASE("status: an error carries its code and message, ok none") {
  CHECK(Status().is_ok());
  const Status status = Status::error(Code::busy, "wait");
  CHECK(!status);
  CHECK(status.code() == Code::busy);
  CHECK(status.message() == "wait");
  CHECK(name_of(Code::busy) == "busy");
  const Result<int> failed = status;
  CHECK(!failed);
  CHECK(failed.status().message() == "wait");
  CHECK(*Result<int>(7) == 7);
}

TEST_CASE("readable: UTF-8 stays, control characters and other bytes do not") {
  constexpr const char* kReplacement = "\xef\xbf\xbd";
  const std::string r = kReplacement;
  for (const std::string same :
       {"", "a\nb", "µ ≤ …", "\xf0\x9f\x98\x80", "\xc2\xa0", "\xed\x9f\xbf", "\xf4\x8f\xbf\xbf"})
    CHECK(readable(same) == same);
  const std::pair<std::string, std::string> rows[] = {
      {"a\tb\r\x7f"
       "c",
       "a b  c"},
      {std::string("a\0b", 3), "a b"},
      {"\x1b[2J", " [2J"},
      {"\xc2\x9b"
       "2J",
       " 2J"},                             // C1: another escape
      {"\xff\xfe", r + r},                 // never in UTF-8
      {"\x80", r},                         // continues nothing
      {"\xc0\xaf", r + r},                 // overlong
      {"\xe0\x80\xaf", r + r + r},         // overlong
      {"\xf0\x80\x80\xaf", r + r + r + r}, // overlong
      {"\xed\xa0\x80", r + r + r},         // a surrogate
      {"\xf4\x90\x80\x80", r + r + r + r}, // beyond U+10FFFF
      {"\xe2\x89", r + r},                 // cut short
      {"\xe2"
       "a",
       r + "a"},
  };
  for (const auto& [text, expected] : rows) {
    CAPTURE(expected);
    CHECK(readable(text) == expected);
  }
}

TEST_CASE("readable: of a long text both ends stay, cut between characters") {
  const std::string cut = readable("given" + std::string(100'000, 'x') + "allowed");
  CHECK(cut.size() < (16 << 10) + 8);
  CHECK(cut.starts_with("given"));
  CHECK(cut.find("x … x") != std::string::npos);
  CHECK(cut.ends_with("allowed"));
  for (int shift = 0; shift < 3; ++shift) {
    std::string wide(static_cast<std::size_t>(shift), 'a');
    for (int i = 0; i < 10'000; ++i)
      wide += "≤";
    CHECK(readable(wide).find("\xef\xbf\xbd") == std::string::npos);
  }
}

TEST_CASE("status: a message is readable whatever it quotes") {
  CHECK(Status::error(Code::io, std::string("path \xff\x1b[2J\0end", 14)).message() == "path \xef\xbf\xbd [2J end");
}

TEST_CASE("bytes: what Writer wrote, Reader reads, in little-endian order") {
  Writer writer;
  writer.u8(0xfe);
  writer.u32(0x01020304);
  writer.u64(0x1122334455667788);
  writer.i64(-2);
  writer.string("text");
  writer.blob({});
  const Bytes bytes = writer.take();
  CHECK(bytes[0] == 0xfe);
  CHECK(bytes[1] == 4);
  CHECK(bytes[4] == 1);
  CHECK(bytes.size() == 1 + 4 + 8 + 8 + (8 + 4) + 8);

  Reader reader(bytes);
  CHECK(reader.u8() == 0xfe);
  CHECK(reader.u32() == 0x01020304);
  CHECK(reader.u64() == 0x1122334455667788);
  CHECK(reader.i64() == -2);
  CHECK(reader.string() == "text");
  CHECK(!reader.finished());
  CHECK(reader.blob().empty());
  CHECK(reader.finished());
}

TEST_CASE("bytes: a truncated input gives zeros and is never read past") {
  Writer writer;
  writer.u32(7);
  writer.string("a string");
  writer.u64(9);
  const Bytes whole = writer.take();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    // A copy of its own, so that the sanitizer sees a read past its end.
    const Bytes part(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
    Reader reader(part);
    reader.u32();
    reader.string();
    CHECK(reader.u64() == 0);
    CHECK(!reader.ok());
    CHECK(!reader.finished());
    CHECK(reader.u8() == 0);
    CHECK(reader.blob().empty());
  }
}

TEST_CASE("bytes: a length that overruns the input is refused, whatever its size") {
  for (const std::uint64_t length :
       {std::uint64_t{9}, std::uint64_t{1} << 32, ~std::uint64_t{0}, ~std::uint64_t{0} - 7}) {
    Writer writer;
    writer.u64(length);
    writer.u64(0);
    const Bytes bytes = writer.take();
    Reader reader(bytes);
    CHECK(reader.blob().empty());
    CHECK(!reader.ok());
  }
}

TEST_CASE("digest: BLAKE2b-256 of known inputs") {
  // RFC 7693's algorithm with a 32-byte output; values of Python's hashlib.blake2b(data, digest_size=32, key=...).
  CHECK(digest_of({}).hex() == "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8");
  CHECK(digest_of(bytes_of("abc")).hex() == "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
  Digest key;
  for (std::size_t i = 0; i < key.bytes.size(); ++i)
    key.bytes[i] = static_cast<std::uint8_t>(i);
  CHECK(keyed_digest_of(key, bytes_of("abc")).hex() ==
        "d63a32d3e44738d7907f964316c241adaba0abfeabc32349677578a15a203f7f");
  CHECK(keyed_digest_of(key, {}) != digest_of({}));
}

TEST_CASE("digest: hexadecimal text has one form") {
  const Digest digest = digest_of(bytes_of("kiln"));
  const std::string text = digest.hex();
  CHECK(text.size() == 64);
  REQUIRE(Digest::from_hex(text));
  CHECK(*Digest::from_hex(text) == digest);
  for (const std::string& bad : {text + "0", text.substr(1), std::string(), std::string(64, 'A'), std::string(64, 'g'),
                                 std::string(63, '0') + " ", std::string(64, '\0')})
    CHECK(!Digest::from_hex(bad));
}

TEST_CASE("digest: equality notices every bit") {
  const Digest digest = digest_of(bytes_of("kiln"));
  CHECK(equal_in_constant_time(digest, digest));
  for (std::size_t bit = 0; bit < 256; ++bit) {
    Digest other = digest;
    other.bytes[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
    CHECK(!equal_in_constant_time(digest, other));
  }
}

TEST_CASE("log: levels filter, and a host's sink gets the message alone") {
  std::vector<Message> messages;
  const Log log(LogLevel::info, &collect, &messages);
  CHECK(!log.enabled(LogLevel::debug));
  CHECK(log.enabled(LogLevel::info));
  log.debug("no");
  log.info("one");
  log.warn("two {} %s");
  log.error("three");
  REQUIRE(messages.size() == 3);
  CHECK(messages[0].level == LogLevel::info);
  CHECK(messages[0].text == "one");
  CHECK(messages[1].level == LogLevel::warn);
  CHECK(messages[1].text == "two {} %s");
  CHECK(messages[2].level == LogLevel::error);
}

TEST_CASE("log: off is silent") {
  std::vector<Message> messages;
  const Log log(LogLevel::off, &collect, &messages);
  log.error("nobody hears");
  CHECK(messages.empty());
}

TEST_CASE("log: a message is one line, and control characters do not get through") {
  std::vector<Message> messages;
  const Log log(LogLevel::warn, &collect, &messages);
  log.warn("path \x1b[2J/tmp/a\nkiln: [error] forged");
  REQUIRE(messages.size() == 1);
  CHECK(messages[0].text == "path  [2J/tmp/a kiln: [error] forged");
}

TEST_CASE("log: a sink is called by one thread at a time") {
  std::vector<Message> messages; // unguarded: ThreadSanitizer and the count would tell
  const Log log(LogLevel::warn, &collect, &messages);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 100; ++i)
        log.warn("message");
    });
  for (std::thread& thread : threads)
    thread.join();
  CHECK(messages.size() == 800);
}

TEST_CASE("log: level names") {
  for (const char* name : {"trace", "debug", "info", "warn", "error", "off"}) {
    LogLevel level = LogLevel::trace;
    CHECK(parse_log_level(name, level));
    CHECK((level == LogLevel::trace) == (std::string_view(name) == "trace"));
  }
  LogLevel level = LogLevel::error;
  for (const char* name : {"", "WARN", "warning", "loud", "warn "})
    CHECK(!parse_log_level(name, level));
  CHECK(level == LogLevel::error);
}
