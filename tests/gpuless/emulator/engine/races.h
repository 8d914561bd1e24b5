// Happens-before by vector clocks, and the shadow of memory that tells accesses which nothing orders.
//
// A block's clock, its epoch, counts its block barriers; a warp's clock counts its memory instructions. Access a comes
// before access b of another thread if both are of one block and a of an earlier epoch; if both are of one warp and a
// warp barrier lies between; or if b's thread has been told of a: by an acquire that read what a release had written,
// its own or, through a block barrier, another thread's.
#pragma once
#include <algorithm>
#include <map>
#include <unordered_map>
#include <vector>

#include "interface.h"

const u32 THREADS = 1024;  // at most, of a block: a thread's number in the grid is block * THREADS + thread

struct Stamp {
  u32 thread, epoch, time;  // number in the grid, block's clock, warp's clock
};

// What releases have told: of a block all that lies before an epoch, of a thread all that lies up to a time.
struct Knowledge {
  std::vector<u32> epochs;
  std::map<u32, u32> times;

  void learn(const Knowledge& other) {
    if (epochs.size() < other.epochs.size()) epochs.resize(other.epochs.size(), 0);
    for (size_t i = 0; i < other.epochs.size(); i++) epochs[i] = std::max(epochs[i], other.epochs[i]);
    for (auto& [thread, time] : other.times) times[thread] = std::max(times[thread], time);
  }
  bool past(const Stamp& s) const {
    u32 block = s.thread / THREADS;
    return block < epochs.size() && s.epoch < epochs[block];
  }
  bool covers(const Stamp& s) const {
    auto known = times.find(s.thread);
    return past(s) || (known != times.end() && s.time <= known->second);
  }
};

// The clock of a block, and what it and its threads know.
struct Clock {
  u32 block = 0, epoch = 1;
  Knowledge knowledge;
  std::unordered_map<u32, Knowledge> of_threads;  // acquired by a thread since the last block barrier

  void barrier() {
    for (auto& [thread, known] : of_threads) knowledge.learn(known);
    of_threads.clear();
    epoch++;
    auto own = knowledge.times.lower_bound(block * THREADS);  // said of an epoch that is over
    knowledge.times.erase(own, knowledge.times.lower_bound((block + 1) * THREADS));
  }
};

enum class Access { READ, STRONG_READ, STRONG_WRITE, WRITE };  // strong: atomic, or relaxed and better

struct Actor {  // who accesses
  const Clock& clock;
  u32 thread, time, warp_barrier;  // in the grid; warp's clock; warp's clock at its last warp barrier
  i32 instruction;
};

// The last plain write of a place, and since then one read and one strong access of every block.
struct Cell {
  struct Last {
    Stamp stamp;
    i32 instruction;
    Access access;
    bool by_threads, by_warps;  // by more than one
  };
  Stamp write{};
  i32 write_instruction = -1;
  u32 written = 0;  // by the last plain write
  i32 copies = 0;   // cp.async under way
  std::vector<Last> others;
};

class RaceDetector {
 public:
  // Calls found(kind, instruction before, thread before) for each access that the present one races with.
  template <class Found> void check(Cell& cell, Access access, const Actor& who, Found found) {
    if (cell.write_instruction >= 0 && !ordered(cell.write, who))
      found(access == Access::WRITE ? TWO_WRITES : access == Access::STRONG_WRITE ? ATOMIC_AND_PLAIN : WRITE_THEN_READ,
            cell.write_instruction, cell.write.thread);
    for (const Cell::Last& last : cell.others)
      if (conflict(last.access, access) && !ordered(last, who))
        found(last.access == Access::READ && access == Access::WRITE ? READ_THEN_WRITE : ATOMIC_AND_PLAIN,
              last.instruction, last.stamp.thread);
    note(cell, access, who);
  }

  // The most frequent case in short: a read of what nobody else has touched since the own block wrote it.
  bool read_own(Cell& cell, const Actor& who) const {
    if (cell.others.size() > 1) return false;
    if (cell.write_instruction >= 0 &&
        (cell.write.thread / THREADS != who.clock.block || cell.write.epoch >= who.clock.epoch))
      return false;
    for (const Cell::Last& last : cell.others)
      if (last.access != Access::READ || last.stamp.thread / THREADS != who.clock.block) return false;
    note(cell, Access::READ, who);
    return true;
  }

  // A release to a place tells whoever acquires from it; an atomic that does not release passes on what was told.
  void release(u64 place, const Actor& who) {
    Knowledge message = who.clock.knowledge;
    auto own = who.clock.of_threads.find(who.thread);
    if (own != who.clock.of_threads.end()) message.learn(own->second);
    if (message.epochs.size() <= who.clock.block) message.epochs.resize(who.clock.block + 1, 0);
    message.epochs[who.clock.block] = who.clock.epoch;
    message.times[who.thread] = who.time;
    messages[place].learn(message);
  }
  void acquire(u64 place, Clock& clock, u32 thread) {
    auto message = messages.find(place);
    if (message != messages.end()) clock.of_threads[thread].learn(message->second);
  }
  void overwrite(u64 place) { messages.erase(place); }

 private:
  std::map<u64, Knowledge> messages;

  static bool conflict(Access before, Access now) {
    switch (now) {
      case Access::READ: return before == Access::STRONG_WRITE;
      case Access::STRONG_READ: return false;
      case Access::STRONG_WRITE: return before == Access::READ;
      default: return true;
    }
  }
  static bool ordered(const Stamp& s, const Actor& who) {
    if (s.thread == who.thread) return true;
    if (s.thread / LANES == who.thread / LANES && s.time <= who.warp_barrier) return true;
    if (s.thread / THREADS == who.clock.block && s.epoch < who.clock.epoch) return true;
    if (who.clock.knowledge.covers(s)) return true;
    if (who.clock.of_threads.empty()) return false;
    auto own = who.clock.of_threads.find(who.thread);
    return own != who.clock.of_threads.end() && own->second.covers(s);
  }
  static bool ordered(const Cell::Last& last, const Actor& who) {
    const Stamp& s = last.stamp;
    if (!last.by_threads) return ordered(s, who);
    // The stamp is the last of several: of its thread alone nothing need be known.
    if (!last.by_warps && s.thread / LANES == who.thread / LANES && s.time <= who.warp_barrier) return true;
    if (s.thread / THREADS == who.clock.block) return s.epoch < who.clock.epoch;
    auto own = who.clock.of_threads.find(who.thread);
    return who.clock.knowledge.past(s) || (own != who.clock.of_threads.end() && own->second.past(s));
  }
  static void note(Cell& cell, Access access, const Actor& who) {
    Stamp now{who.thread, who.clock.epoch, who.time};
    if (access == Access::WRITE) {
      cell.others.clear();
      cell.write = now;
      cell.write_instruction = who.instruction;
      return;
    }
    for (Cell::Last& last : cell.others) {
      if (last.access != access || last.stamp.thread / THREADS != who.clock.block) continue;
      if (last.stamp.epoch != who.clock.epoch) {
        last = Cell::Last{now, who.instruction, access, false, false};
      } else if (last.stamp.thread != who.thread) {
        last.by_threads = true;
        if (last.stamp.thread / LANES != who.thread / LANES) last.by_warps = true;
        last.stamp = now;
        last.instruction = who.instruction;
      } else {
        last.stamp.time = now.time;
      }
      std::swap(last, cell.others.front());  // it will be looked for again
      return;
    }
    cell.others.push_back(Cell::Last{now, who.instruction, access, false, false});
  }
};
