#include <doctest/doctest.h>

#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "cache/table.h"

using namespace kiln;

namespace {

struct Key {
  std::uint64_t id = 0;
  bool operator==(const Key&) const = default;
  std::uint64_t hash() const { return id % 7; } // many collisions
};

/// Knows how many of it live, and that it is what its key says.
struct Value {
  static inline std::atomic<int> alive{0};
  std::uint64_t id;
  bool owns = true;
  explicit Value(std::uint64_t i) : id(i) { ++alive; }
  Value(Value&& other) noexcept : id(other.id), owns(std::exchange(other.owns, false)) {}
  ~Value() {
    if (owns)
      --alive;
  }
};

using Table = SharedTable<Key, Value>;

/// A table that counts the end of itself.
struct Owned {
  std::atomic<int> ended{0};
  Table* table;
  explicit Owned(std::size_t max_weight)
      : table(new Table(max_weight, [this] {
          ++ended;
          delete std::exchange(table, nullptr);
        })) {}
};

Table::Node* get(Table& table, std::uint64_t id, std::atomic<int>* made = nullptr) {
  return table.get_or_make(
      Key{id},
      [&]() -> std::optional<Table::Made> {
        if (made != nullptr)
          ++*made;
        return Table::Made{Value(id), 1};
      },
      std::chrono::milliseconds(5000));
}

} // namespace

TEST_CASE("what was made is found, with its key") {
  Owned owned(100);
  Table::release(get(*owned.table, 1));
  Table::release(get(*owned.table, 8)); // same hash
  Table::Node* node = owned.table->find(Key{8});
  REQUIRE(node != nullptr);
  CHECK(node->value().id == 8);
  Table::release(node);
  CHECK(owned.table->find(Key{15}) == nullptr);
  CHECK(owned.table->stats().resident == 2);
  owned.table->close();
  CHECK(owned.ended == 1);
  CHECK(Value::alive == 0);
}

TEST_CASE("eviction keeps the bound, spares what is held and what was used") {
  Owned owned(10);
  Table::Node* held = get(*owned.table, 1000);
  for (std::uint64_t i = 0; i < 100; ++i)
    Table::release(get(*owned.table, i));
  CHECK(owned.table->stats().weight <= 10);
  CHECK(owned.table->stats().evictions == 91);
  CHECK(Value::alive == 10);
  Table::Node* again = owned.table->find(Key{1000});
  CHECK(again == held);
  Table::release(again);
  Table::release(held);
  owned.table->close();
  CHECK(Value::alive == 0);
}

TEST_CASE("a held value outlives its eviction and the table's closing") {
  Owned owned(1);
  Table::Node* held = get(*owned.table, 5);
  owned.table->drop(Key{5});
  CHECK(owned.table->find(Key{5}) == nullptr);
  CHECK(held->value().id == 5);
  owned.table->close();
  CHECK(owned.ended == 0);
  CHECK(held->value().id == 5);
  Table::release(held);
  CHECK(owned.ended == 1);
  CHECK(Value::alive == 0);
}

TEST_CASE("a value that is not resident is the caller's alone") {
  Owned owned(10);
  Table::Node* node = owned.table->get_or_make(
      Key{3},
      []() -> std::optional<Table::Made> {
        return Table::Made{Value(3), 1, false};
      },
      std::chrono::milliseconds(1));
  CHECK(owned.table->find(Key{3}) == nullptr);
  Table::release(node);
  CHECK(Value::alive == 0);
  owned.table->close();
}

TEST_CASE("64 threads on one cold key make it once") {
  Owned owned(10);
  std::atomic<int> made{0}, wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 64; ++i)
    threads.emplace_back([&] {
      Table::Node* node = owned.table->get_or_make(
          Key{42},
          [&]() -> std::optional<Table::Made> {
            ++made;
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            return Table::Made{Value(42), 1};
          },
          std::chrono::milliseconds(5000));
      wrong += node == nullptr || node->value().id != 42;
      Table::release(node);
    });
  for (std::thread& thread : threads)
    thread.join();
  CHECK(made == 1);
  CHECK(wrong == 0);
  owned.table->close();
}

TEST_CASE("a failure is everyone's own: waiters try for themselves, nothing stays in flight") {
  Owned owned(10);
  const auto fails = []() -> std::optional<Table::Made> { return std::nullopt; };
  CHECK(owned.table->get_or_make(Key{1}, fails, std::chrono::milliseconds(1)) == nullptr);
  Table::Node* node = get(*owned.table, 1);
  REQUIRE(node != nullptr);
  Table::release(node);
  owned.table->close();
}

TEST_CASE("a value goes to waste, not the key, when there is no memory for its node") {
  struct Short { // a key that cannot be copied the second time: into its node
    std::uint64_t id = 0;
    int* copies = nullptr;
    Short() = default;
    Short(std::uint64_t i, int* c) : id(i), copies(c) {}
    Short(const Short& other) = default;
    Short& operator=(const Short& other) {
      if (other.copies != nullptr && --*other.copies < 0)
        throw std::bad_alloc();
      id = other.id;
      return *this;
    }
    bool operator==(const Short& other) const { return id == other.id; }
    std::uint64_t hash() const { return id; }
  };
  int copies = 0;
  SharedTable<Short, Value> table(10, nullptr);
  const auto make = [] { return std::optional(SharedTable<Short, Value>::Made{Value(1), 1}); };
  CHECK_THROWS_AS(table.get_or_make(Short(1, &copies), make, std::chrono::milliseconds(1)), std::bad_alloc);
  const auto start = std::chrono::steady_clock::now();
  SharedTable<Short, Value>::release(table.get_or_make(Short(1, nullptr), make, std::chrono::seconds(20)));
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10)); // not waiting for the one that failed
}

TEST_CASE("patience ends: a second maker goes ahead when the first hangs") {
  Owned owned(10);
  std::atomic<bool> release_first{false}, first_is_in{false};
  std::thread first([&] {
    Table::Node* node = owned.table->get_or_make(
        Key{9},
        [&]() -> std::optional<Table::Made> {
          first_is_in = true;
          while (!release_first)
            std::this_thread::yield();
          return Table::Made{Value(9), 1};
        },
        std::chrono::milliseconds(1));
    Table::release(node);
  });
  while (!first_is_in)
    std::this_thread::yield();
  Table::Node* node = owned.table->get_or_make(
      Key{9},
      []() -> std::optional<Table::Made> {
        return Table::Made{Value(9), 1};
      },
      std::chrono::milliseconds(10));
  CHECK(node->value().id == 9);
  Table::release(node);
  release_first = true;
  first.join();
  CHECK(owned.table->stats().resident == 1);
  owned.table->close();
  CHECK(Value::alive == 0);
}

TEST_CASE("readers never see a wrong value while nodes are evicted and reused") {
  Owned owned(16);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 6; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 20000; ++i) {
        const std::uint64_t id = random() % 64;
        Table::Node* node = random() % 2 ? owned.table->find(Key{id}) : get(*owned.table, id);
        if (node != nullptr) {
          wrong += node->value().id != id || node->key().id != id;
          Table::release(node);
        }
      }
    });
  for (std::thread& thread : threads)
    thread.join();
  CHECK(wrong == 0);
  CHECK(owned.table->stats().weight <= 16);
  owned.table->close();
  CHECK(Value::alive == 0);
}
