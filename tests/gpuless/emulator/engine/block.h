// A block of threads, warp by warp: registers, divergence, the block barrier.
#pragma once
#include <vector>

#include "memory.h"

struct Frame {  // lanes that run together from pc until they meet the others again
  i32 pc, reconvergence;
  Mask lanes;
};

struct Copy {  // a cp.async under way
  u32 to, bytes;
  u64 from;
  u32 given;  // bytes that come from memory; the rest is zero
  int lane;
  i32 instruction;
};

struct Block;

struct Warp {
  Block* block = nullptr;
  u32 index = 0;
  std::vector<u8> storage, local;
  u8* registers = nullptr;
  std::vector<Mask> predicates;
  std::vector<Frame> frames;
  i32 pc = 0;
  Mask active = ~0u, live = ~0u;
  bool waiting = false, spinning = false;  // at the block barrier; since it looked at what others write
  bool jumped = false, yields = false;     // set by an instruction: pc is as it should be; another warp may run
  u32 clock = 1, warp_barrier = 0;
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> groups;
  double weight = 1;

  template <class T> T* at(i32 offset) { return (T*)(registers + offset); }
  bool ended() const { return live == 0; }

  void start(Block& owner, u32 number, const Launch& launch) {
    block = &owner, index = number;
    storage.resize(launch.register_bytes + 64);
    registers = storage.data() + (64 - (u64)storage.data() % 64) % 64;
    memcpy(registers, launch.registers, launch.register_bytes);
    predicates.assign(launch.predicates, launch.predicates + launch.predicate_count);
    frames.assign(1, Frame{0, -1, ~0u});
    local.assign((size_t)launch.local_bytes * LANES, 0xff);
  }
  void go_to(i32 next) {
    frames.back().pc = next;
    meet();
  }
  void branch(i32 target, i32 reconvergence, Mask taken, bool taken_first) {
    Mask others = active & ~taken;
    if (!taken || !others) return go_to(taken ? target : pc + 1);
    frames.back().pc = reconvergence;
    Frame jump{target, reconvergence, taken}, on{pc + 1, reconvergence, others};
    frames.push_back(taken_first ? on : jump);
    frames.push_back(taken_first ? jump : on);
    meet();
  }
  void exit(Mask lanes) {
    live &= ~lanes;
    go_to(pc + 1);
  }

 private:
  void meet() {  // leaves frames whose lanes have ended or have come to where they meet
    while (frames.size() > 1) {
      Frame& top = frames.back();
      bool together = top.reconvergence >= 0 && top.pc == top.reconvergence;
      if (!together && (top.lanes & live)) break;
      frames.pop_back();
    }
    pc = frames.back().pc;
    active = frames.back().lanes & live;
  }
};

struct Block {
  u32 index = 0, x = 0, y = 0, z = 0;
  Clock clock;
  std::vector<Warp> warps;
  SharedMemory shared;
  View view;
  double weight = 1;

  bool ended() const {
    for (const Warp& warp : warps)
      if (!warp.ended()) return false;
    return true;
  }
};
