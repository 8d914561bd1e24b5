// A launch under way: its memory, its blocks, what has been found.
#pragma once
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "block.h"
#include "count.h"

class Machine {
 public:
  const Launch& launch;
  const Schedule& schedule;
  Statistics statistics{};
  GlobalMemory global;
  RaceDetector races;
  std::vector<Block> blocks;
  std::map<std::tuple<i32, i32, i32, i32, i32>, Finding> findings;
  std::mt19937_64 random;
  bool stopped = false;  // nothing sensible can follow

  Machine(const Launch& launch, const Schedule& schedule) : launch(launch), schedule(schedule), random(schedule.seed) {
    global.start(launch, schedule.races);
    for (u32 i = 0; i < launch.grid[0] * launch.grid[1] * launch.grid[2]; i++) {
      Block block;
      block.index = block.clock.block = i;
      block.x = i % launch.grid[0], block.y = i / launch.grid[0] % launch.grid[1];
      block.z = i / launch.grid[0] / launch.grid[1];
      blocks.push_back(std::move(block));
    }
  }

  void report(i32 kind, i32 reach, i32 space, i32 first, i32 second, i32 first_block, i32 first_thread,
              i32 second_block, i32 second_thread, bool same_value, u64 address) {
    auto key = std::make_tuple(kind, reach, space, first, second);
    auto [place, is_new] = findings.try_emplace(key, Finding{kind, reach, space, first, second, first_block, first_thread,
                                                             second_block, second_thread, same_value, address, 0});
    place->second.count++;
    place->second.same_value &= same_value;
  }
  void fault(const Warp& w, int lane, i32 kind, i32 space, u64 address) {
    report(kind, NO_REACH, space, -1, w.pc, -1, -1, w.block->index, w.index * LANES + lane, false, address);
  }

  Counts* counts(const Warp& w) const {  // of the instruction under way, if it is counted
    return launch.counts && (i32)w.block->index == launch.counted ? &launch.counts[w.pc] : nullptr;
  }

  Actor actor(const Warp& w, int lane) const {
    u32 thread = w.block->index * THREADS + w.index * LANES + lane;
    return Actor{w.block->clock, thread, w.clock, w.warp_barrier, w.pc};
  }

  // Checks an access to shadow cells; value: what a plain write stores. Returns whether it races.
  bool check(std::vector<Cell>& cells, int grain, Warp& w, int lane, i32 space, u64 origin, u64 offset, u32 length,
             Access access, const u8* value, u32 used = ~0u) {
    bool raced = false;
    const Actor who = actor(w, lane);
    for (u64 place = offset / grain; place * grain < offset + length; place++) {
      u64 begin = std::max(place * grain, offset), end = std::min((place + 1) * grain, offset + length);
      if (used != ~0u && !(used >> (begin - offset) & 1)) continue;
      Cell& cell = cells[place];
      if (cell.copies) fault(w, lane, COPY_UNDER_WAY, space, origin + begin);
      if (access == Access::READ && races.read_own(cell, who)) continue;
      u32 written = 0;
      if (value) memcpy(&written, value + (begin - offset), end - begin);
      races.check(cell, access, who, [&](i32 kind, i32 first, u32 thread) {
        raced = true;
        i32 reach = thread / LANES == who.thread / LANES ? IN_WARP : thread / THREADS == w.block->index ? IN_BLOCK : IN_GRID;
        bool same = kind == TWO_WRITES && value && written == cell.written;
        report(kind, reach, space, first, w.pc, thread / THREADS, thread % THREADS, w.block->index, who.thread % THREADS,
               same, origin + begin);
      });
      if (value) cell.written = written;
    }
    return raced;
  }

  // --- global memory: the offset of an address, or a report and false
  bool global_offset(Warp& w, int lane, u64 address, u32 length, u64& offset) {
    offset = address - global.base;
    if (!global.holds(offset, length)) return fault(w, lane, OUT_OF_BOUNDS, GLOBAL, address), false;
    if (address % length) return fault(w, lane, MISALIGNED, GLOBAL, address), false;
    return true;
  }
  bool check_global(Warp& w, int lane, u64 offset, u32 length, Access access, const u8* value = nullptr) {
    if (access != Access::WRITE && !global.written(offset, length) && !value)
      fault(w, lane, UNWRITTEN, GLOBAL, global.base + offset);
    return schedule.races && check(global.cells, global.grain, w, lane, GLOBAL, global.base, offset, length, access, value);
  }
  void load_global(Warp& w, int lane, u64 offset, u32 length, u8* out) {
    bool raced = check_global(w, lane, offset, length, Access::READ);
    statistics.stale_reads += w.block->view.read(offset, length, out);
    if (raced && schedule.poison_racing) memset(out, 0xff, length), statistics.poisoned_reads++;
  }

  // --- shared memory
  bool shared_offset(Warp& w, int lane, u32 address, u32 length, u32& offset) {
    offset = address - SharedMemory::BASE;
    if (offset >= launch.shared_bytes || length > launch.shared_bytes - offset)
      return fault(w, lane, OUT_OF_BOUNDS, SHARED, address), false;
    if (address % length) return fault(w, lane, MISALIGNED, SHARED, address), false;
    return true;
  }
  void load_shared(Warp& w, int lane, u32 offset, u32 length, u8* out, u32 used = ~0u) {
    SharedMemory& shared = w.block->shared;
    for (u32 i = 0; i < length; i++)
      if ((used >> i & 1) && !shared.written[offset + i]) {
        fault(w, lane, UNWRITTEN, SHARED, SharedMemory::BASE + offset + i);
        break;
      }
    bool raced = schedule.races && check(shared.cells, shared.grain, w, lane, SHARED, SharedMemory::BASE, offset, length,
                                         Access::READ, nullptr, used);
    memcpy(out, &shared.bytes[offset], length);
    if (raced && schedule.poison_racing) memset(out, 0xff, length), statistics.poisoned_reads++;
  }
  void store_shared(Warp& w, int lane, u32 offset, u32 length, const u8* value) {
    SharedMemory& shared = w.block->shared;
    if (schedule.races)
      check(shared.cells, shared.grain, w, lane, SHARED, SharedMemory::BASE, offset, length, Access::WRITE, value);
    memcpy(&shared.bytes[offset], value, length);
    memset(&shared.written[offset], 1, length);
  }

  void start(Block& block);
  void finish(Block& block);
  void turn(Warp& warp, int instructions);
  void arrive(Block& block);
  void complete(Warp& w, std::vector<Copy>& group);
};
