#include <algorithm>

#include "cache/redis.h"
#include "tests/fuzz/fuzz.h"

/// What a Redis server, or whatever answers in its place, sends. The first byte says in pieces of which size it comes.
namespace kiln::fuzz {
namespace {

constexpr std::size_t most_bytes = 1000;

/// Every reply up to the end or the first fault; whether there was none.
bool parses(std::string_view text, std::size_t piece, std::vector<RedisReply>& replies) {
  RedisReplyParser parser(most_bytes);
  const auto take_all = [&] {
    for (;;) {
      Result<std::optional<RedisReply>> reply = parser.next();
      if (!reply) {
        expect_refusal(reply.status(), Code::integrity);
        return false;
      }
      if (!*reply)
        return true;
      expect((*reply)->bytes.size() <= most_bytes, "a reply is of bounded size");
      replies.push_back(std::move(**reply));
    }
  };
  for (; !text.empty(); text.remove_prefix(std::min(piece, text.size()))) {
    if (const Status status = parser.feed(text.substr(0, piece)); !status) {
      expect_refusal(status, Code::integrity);
      return false;
    }
    if (!take_all())
      return false;
  }
  return parser.is_empty();
}

bool accepts(ByteSpan input) {
  if (input.empty())
    return false;
  const std::string_view text = text_of(input.subspan(1));
  std::vector<RedisReply> in_pieces, by_byte;
  const bool is_sound = parses(text, 1 + input[0], in_pieces);
  // Pieces are how the network has it: they change nothing, but for what a limit leaves unread.
  if (parses(text, 1, by_byte) && is_sound)
    expect(std::equal(in_pieces.begin(), in_pieces.end(), by_byte.begin(), by_byte.end(),
                      [](const RedisReply& a, const RedisReply& b) {
                        return a.kind == b.kind && a.bytes == b.bytes && a.integer == b.integer;
                      }),
           "replies are the same in any pieces");
  return is_sound;
}

std::vector<Seed> seeds() {
  return {accepted("\xff+OK\r\n"),
          accepted("\x03-ERR no\r\n:42\r\n$-1\r\n"),
          accepted("\x01$5\r\na\r\nbc\r\n$0\r\n\r\n"),
          accepted("\x02*-1\r\n"),
          refused("\xff*2\r\n$1\r\na\r\n$1\r\nb\r\n"),
          refused("\xff*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n"),
          refused("\xff*2147483647\r\n"),
          refused("\x05$1001\r\n"),
          refused("\x05$9223372036854775807\r\n"),
          refused("\xff$-2\r\n"),
          refused("\xff%1\r\n"),
          refused("\x01$5\r\nab")};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
