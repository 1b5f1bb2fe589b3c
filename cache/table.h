#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <forward_list>
#include <functional>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cache/process.h"

namespace kiln {

/// L1: an in-memory table of shared values with single-flight.
///
/// A hit takes no lock: nodes are type-stable (their memory stays a node for the table's life), so a reader may first
/// try to take a reference and only then compare the key. A node with references is never rewritten, so a key that
/// compares equal stays equal. What a reader misses through a concurrent change it finds under the lock in get_or_make.
///
/// Held references keep a value alive after its eviction and after close(). The table must outlive them: `on_empty` is
/// called once, when close() has been called and the last reference is gone, and may destroy the table.
///
/// Survives fork at any moment: everything shared changes by single stores, each of which leaves what a child can go on
/// with, and a child has a lock of its own. What other threads were about to make, or held, is never freed in the
/// child.
///
/// Key: copyable, ==, `std::uint64_t hash() const`. Value: movable; destroyed when the last reference goes.
template <class Key, class Value> class SharedTable {
public:
  class Node {
  public:
    const Key& key() const { return key_; }
    Value& value() { return *value_; }
    const Value& value() const { return *value_; }
    std::uint64_t hits() const { return hits_.load(std::memory_order_relaxed); }

  private:
    friend class SharedTable;
    std::atomic<std::uint32_t> references_{0};
    std::atomic<bool> used_{false}; ///< since the eviction hand last passed
    std::atomic<std::uint64_t> hits_{0};
    std::atomic<std::uint64_t> hash_{0};
    Key key_{};
    std::optional<Value> value_;
    std::size_t weight_ = 0;
    SharedTable* table_ = nullptr;
    Node* next_free_ = nullptr;
  };

  /// `max_weight` bounds the sum of weights of resident nodes; the bound may be passed while every node is held.
  SharedTable(std::size_t max_weight, std::function<void()> on_empty)
      : max_weight_(max_weight), on_empty_(std::move(on_empty)) {
    slots_.store(&arrays_.emplace_front(kFewestSlots), std::memory_order_release);
  }
  ~SharedTable() {
    if (const Makers* makers = makers_; makers->process == current_process()) // a parent's lock may be held for good
      delete makers;
  }
  SharedTable(const SharedTable&) = delete;
  SharedTable& operator=(const SharedTable&) = delete;

  /// The node with this key, with a reference for the caller, or null. Lock-free.
  Node* find(const Key& key) {
    const std::uint64_t hash = key.hash();
    Slots* slots = slots_.load(std::memory_order_acquire);
    for (std::size_t i = hash;; ++i) {
      Node* node = slots->at(i).load(std::memory_order_acquire);
      if (node == nullptr)
        return nullptr;
      if (node == tombstone() || node->hash_.load(std::memory_order_relaxed) != hash || !try_acquire(node))
        continue;
      if (node->key_ == key) {
        node->hits_.fetch_add(1, std::memory_order_relaxed);
        if (!node->used_.load(std::memory_order_relaxed))
          node->used_.store(true, std::memory_order_relaxed);
        return node;
      }
      release(node);
    }
  }

  struct Made {
    Value value;
    std::size_t weight;
    bool resident = true; ///< false: for this caller only (a stand-in that the next get must not find)
  };

  /// find(), or calls `make` (std::optional<Made>(), must not throw) outside any lock and publishes what it gives. One
  /// thread makes a key; others wait up to `patience`, then make for themselves. Null when make gave nothing (waiters
  /// then try for themselves).
  template <class Make> Node* get_or_make(const Key& key, Make&& make, std::chrono::milliseconds patience) {
    Makers& makers = current_makers();
    std::unique_lock lock(makers.mutex);
    const auto deadline = std::chrono::steady_clock::now() + patience;
    for (;;) {
      if (Node* node = find(key))
        return node;
      if (!makers.in_flight(key))
        break;
      if (makers.landed.wait_until(lock, deadline) == std::cv_status::timeout)
        break;
    }
    const Lead lead(makers, key);
    lock.unlock();
    std::optional<Made> made = make();
    lock.lock();
    Node* node = nullptr;
    if (made) {
      node = made->resident ? find(key) : nullptr; // another may have landed it while we made ours
      if (node == nullptr)
        node = insert(key, std::move(*made));
    }
    return node;
  }

  static void add_reference(Node* node) { node->references_.fetch_add(1, std::memory_order_relaxed); }

  /// Gives up one reference. The last one destroys the value.
  static void release(Node* node) {
    if (node->references_.fetch_sub(1, std::memory_order_acq_rel) == 1)
      node->table_->reclaim(node);
  }

  /// Drops the table's own references: every value that nobody holds is destroyed now, the others with their holders.
  /// The table may be gone when this returns.
  void close() {
    drop_if([](const Node&) { return true; });
    one_less_alive();
  }

  /// Drops the node of this key, if resident; holders keep it.
  void drop(const Key& key) {
    drop_if([&](const Node& node) { return node.key_ == key; });
  }

  struct Stats {
    std::size_t resident = 0, weight = 0, evictions = 0;
    std::uint64_t hits = 0;
  };
  Stats stats() const {
    std::lock_guard lock(current_makers().mutex);
    Stats stats{resident_, weight_, evictions_, retired_hits_};
    for (const Node& node : nodes_)
      stats.hits += node.hits();
    return stats;
  }

private:
  /// Open addressing, power-of-two. Older arrays stay allocated, since a reader may still walk one, and are used again
  /// for a table of their size: such a reader sees nodes that it then compares, or misses and looks again under the
  /// lock.
  struct Slots {
    explicit Slots(std::size_t n) : mask(n - 1), slot(n) {}
    std::atomic<Node*>& at(std::size_t i) { return slot[i & mask]; }
    std::size_t mask;
    std::vector<std::atomic<Node*>> slot;
  };

  static Node* tombstone() { return reinterpret_cast<Node*>(alignof(Node)); }

  static bool try_acquire(Node* node) {
    std::uint32_t count = node->references_.load(std::memory_order_relaxed);
    while (count != 0)
      if (node->references_.compare_exchange_weak(count, count + 1, std::memory_order_acquire,
                                                  std::memory_order_relaxed))
        return true;
    return false;
  }

  /// The threads of one process that make values. Its mutex guards the table's changes too.
  struct Makers {
    const ProcessId process = current_process();
    std::mutex mutex;
    std::condition_variable landed;
    std::vector<Key> keys;

    bool in_flight(const Key& key) const { return std::find(keys.begin(), keys.end(), key) != keys.end(); }
  };

  /// A key in flight, unless another thread has it there already. Made and ended with the mutex held.
  class Lead {
  public:
    Lead(Makers& makers, const Key& key) : makers_(makers), key_(key), leads_(!makers.in_flight(key)) {
      if (leads_)
        makers.keys.push_back(key);
    }
    Lead(const Lead&) = delete;
    Lead& operator=(const Lead&) = delete;
    ~Lead() {
      if (!leads_)
        return;
      std::erase(makers_.keys, key_);
      makers_.landed.notify_all();
    }

  private:
    Makers& makers_;
    const Key& key_;
    const bool leads_;
  };

  Makers& current_makers() const {
    Makers* makers = makers_.load(std::memory_order_acquire);
    while (makers->process != current_process()) {
      Makers* const fresh = new Makers;
      if (makers_.compare_exchange_strong(makers, fresh, std::memory_order_acq_rel))
        return *fresh;
      delete fresh; // another thread of the child was first
    }
    return *makers;
  }

  // The rest needs the mutex, but reclaim.

  Node* take_free() {
    Node* node = free_.load(std::memory_order_acquire);
    // Only the holder of the mutex takes, so that the first node's successor stays what it is.
    while (node != nullptr && !free_.compare_exchange_weak(node, node->next_free_, std::memory_order_acquire))
      continue;
    return node;
  }

  Node* insert(const Key& key, Made made) {
    if (made.resident && (used_slots_ + 1) * 2 > slots_.load(std::memory_order_relaxed)->slot.size())
      rebuild();
    Node* node = take_free();
    if (node == nullptr) {
      node = &nodes_.emplace_front();
      node->table_ = this;
    }
    alive_.fetch_add(1, std::memory_order_relaxed);
    node->key_ = key;
    node->value_.emplace(std::move(made.value));
    node->weight_ = made.weight;
    node->used_.store(true, std::memory_order_relaxed);
    retired_hits_ += node->hits_.exchange(0, std::memory_order_relaxed);
    node->hash_.store(key.hash(), std::memory_order_relaxed);
    node->references_.store(made.resident ? 2 : 1, std::memory_order_release); // the table's and the caller's
    if (made.resident) {
      ++resident_; // first, lest a child count less than there is
      weight_ += made.weight;
      used_slots_ += place(*slots_.load(std::memory_order_relaxed), node);
      evict(node);
    }
    return node;
  }

  /// Takes the first slot without a node; returns how many empty slots that used up (a tombstone's was counted
  /// already).
  static std::size_t place(Slots& slots, Node* node) {
    for (std::size_t i = node->hash_.load(std::memory_order_relaxed);; ++i) {
      const Node* there = slots.at(i).load(std::memory_order_relaxed);
      if (there != nullptr && there != tombstone())
        continue;
      slots.at(i).store(node, std::memory_order_release);
      return there == nullptr ? 1 : 0;
    }
  }

  /// Another array, at most a quarter full and without tombstones.
  void rebuild() {
    Slots& old = *slots_.load(std::memory_order_relaxed);
    const std::size_t size = std::max(kFewestSlots, std::bit_ceil((resident_ + 1) * 4));
    Slots* other = nullptr;
    for (Slots& array : arrays_)
      if (&array != &old && array.slot.size() == size)
        other = &array;
    if (other == nullptr)
      other = &arrays_.emplace_front(size);
    for (auto& slot : other->slot)
      slot.store(nullptr, std::memory_order_relaxed);
    std::size_t used = 0;
    for (const auto& slot : old.slot)
      if (Node* node = slot.load(std::memory_order_relaxed); node != nullptr && node != tombstone())
        used += place(*other, node);
    slots_.store(other, std::memory_order_release);
    used_slots_ = used;
  }

  /// Second chance over the slots: a node used since the hand last passed is spared once; one that somebody holds
  /// always.
  void evict(const Node* keep) {
    Slots& slots = *slots_.load(std::memory_order_relaxed);
    for (std::size_t step = 0; weight_ > max_weight_ && step < 2 * slots.slot.size(); ++step) {
      std::atomic<Node*>& slot = slots.at(hand_++);
      Node* node = slot.load(std::memory_order_relaxed);
      if (node == nullptr || node == tombstone() || node == keep)
        continue;
      if (node->references_.load(std::memory_order_relaxed) > 1 ||
          node->used_.exchange(false, std::memory_order_relaxed))
        continue;
      ++evictions_;
      unlink(slot, node);
    }
  }

  template <class Predicate> void drop_if(Predicate predicate) {
    std::lock_guard lock(current_makers().mutex);
    Slots& slots = *slots_.load(std::memory_order_relaxed);
    for (std::size_t i = 0; i < slots.slot.size(); ++i) {
      Node* node = slots.at(i).load(std::memory_order_relaxed);
      if (node != nullptr && node != tombstone() && predicate(*node))
        unlink(slots.at(i), node);
    }
  }

  void unlink(std::atomic<Node*>& slot, Node* node) {
    slot.store(tombstone(), std::memory_order_release);
    --resident_;
    weight_ -= node->weight_;
    release(node);
  }

  /// Without references nobody else can reach the value. Called with or without the mutex; neither locks nor allocates.
  void reclaim(Node* node) {
    node->value_.reset();
    node->next_free_ = free_.load(std::memory_order_relaxed);
    while (!free_.compare_exchange_weak(node->next_free_, node, std::memory_order_release, std::memory_order_relaxed))
      continue;
    one_less_alive();
  }

  void one_less_alive() {
    if (alive_.fetch_sub(1, std::memory_order_acq_rel) != 1)
      return;
    const std::function<void()> on_empty = on_empty_; // a copy: the call may destroy this table
    if (on_empty)
      on_empty();
  }

  static constexpr std::size_t kFewestSlots = 64;

  mutable std::atomic<Makers*> makers_{new Makers};
  std::forward_list<Node> nodes_;
  std::forward_list<Slots> arrays_;
  std::atomic<Slots*> slots_{nullptr};
  std::size_t used_slots_ = 0; ///< filled or tombstones
  std::size_t resident_ = 0, weight_ = 0, evictions_ = 0, hand_ = 0;
  std::uint64_t retired_hits_ = 0;
  const std::size_t max_weight_;
  std::atomic<Node*> free_{nullptr};  ///< the first of those without a value
  std::atomic<std::size_t> alive_{1}; ///< values, resident or held, and one until close()
  const std::function<void()> on_empty_;
};

} // namespace kiln
