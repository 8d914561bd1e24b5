// Global memory as a block sees it, and a block's shared memory.
//
// Stores are written through to global memory, or held back until a release, an atomic on the same bytes or the end of
// the block. Plain loads are served from an L1 cache that keeps a sector of 32 bytes until an acquire drops all of them,
// or reads global memory. Both are what a GPU may do, at its worst.
#pragma once
#include <cstring>
#include <vector>

#include "races.h"

struct GlobalMemory {
  u64 base, size;
  u8 *bytes, *state;
  int grain;
  std::vector<Cell> cells;

  void start(const Launch& launch, bool races) {
    base = launch.base, size = launch.size, bytes = launch.memory, state = launch.state, grain = launch.global_grain;
    if (races) cells.resize(size / grain + 1);
  }
  bool holds(u64 offset, u32 length) const {
    return offset < size && length <= size - offset && all(offset, length, ALLOCATED);
  }
  bool written(u64 offset, u32 length) const { return all(offset, length, WRITTEN); }
  void mark_written(u64 offset, u32 length) { memset(state + offset, ALLOCATED | WRITTEN, length); }

 private:
  bool all(u64 offset, u32 length, u8 flag) const {
    u8 common = 0xff;
    for (u32 i = 0; i < length; i++) common &= state[offset + i];
    return common & flag;
  }
};

class View {  // a block's view of global memory
 public:
  void start(GlobalMemory& memory, bool stale_l1, bool late_stores) {
    global = &memory, stale = stale_l1, late = late_stores;
    if (stale || late) bytes.assign(memory.size + SECTOR, 0), held.assign(memory.size, 0);
    if (stale) filled.assign(memory.size / SECTOR + 1, 0);
  }
  // Returns whether the value is older than what global memory holds.
  bool read(u64 offset, u32 length, u8* out) {
    if (!stale && !late) {
      memcpy(out, global->bytes + offset, length);
      return false;
    }
    bool old = false;
    for (u64 sector = offset / SECTOR; sector <= (offset + length - 1) / SECTOR; sector++)
      if (!stale || filled[sector] != generation) fill(sector);
    memcpy(out, &bytes[offset], length);
    for (u32 i = 0; i < length; i++) old |= !held[offset + i] && out[i] != global->bytes[offset + i];
    return old;
  }
  void write(u64 offset, u32 length, const u8* in) {
    global->mark_written(offset, length);
    if (stale || late) memcpy(&bytes[offset], in, length);
    if (!late) {
      memcpy(global->bytes + offset, in, length);
      return;
    }
    for (u32 i = 0; i < length; i++)
      if (!held[offset + i]) held[offset + i] = 1, held_list.push_back(offset + i);
  }
  // Before an access that is not plain: own stores to these bytes are done, and no later load sees an older value.
  void settle(u64 offset, u32 length) {
    if (!stale && !late) return;
    for (u64 i = offset; i < offset + length; i++)
      if (held[i]) global->bytes[i] = bytes[i], held[i] = 0;
    if (stale)
      for (u64 sector = offset / SECTOR; sector <= (offset + length - 1) / SECTOR; sector++) filled[sector] = 0;
  }
  void acquire() { generation++; }
  void release() {
    for (u64 i : held_list)
      if (held[i]) global->bytes[i] = bytes[i], held[i] = 0;
    held_list.clear();
  }

 private:
  static const u64 SECTOR = 32;
  GlobalMemory* global = nullptr;
  bool stale = false, late = false;
  std::vector<u8> bytes, held;
  std::vector<u64> held_list;
  std::vector<u32> filled;  // the generation in which a sector was filled
  u32 generation = 1;

  void fill(u64 sector) {
    u64 end = std::min(global->size, (sector + 1) * SECTOR);
    for (u64 i = sector * SECTOR; i < end; i++)
      if (!held[i]) bytes[i] = global->bytes[i];
    if (stale) filled[sector] = generation;
  }
};

struct SharedMemory {
  static const u32 BASE = 0x400;  // address of the first byte: 0 is no address
  std::vector<u8> bytes, written;
  std::vector<Cell> cells;
  int grain = 4;

  void start(const Launch& launch, bool races) {
    grain = launch.shared_grain;
    bytes.assign(launch.shared_bytes, 0xff), written.assign(launch.shared_bytes, 0);
    if (races) cells.resize(launch.shared_bytes / grain + 1);
  }
};
