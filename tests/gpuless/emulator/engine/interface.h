// What the engine takes from engine.py and gives back to it; the structures of that file, field by field.
#pragma once
#include <cstdint>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef float f32;
typedef double f64;
typedef u32 Mask;  // one bit a lane

const int LANES = 32;

enum Order { STRONG = 1, ACQUIRE = 2, RELEASE = 4 };  // bits of a memory access; none: a plain one
enum Space { GLOBAL, SHARED, PARAMETERS, LOCAL };

struct Instruction {
  i32 operation;              // its place in operations()
  i32 guard, negated;         // the predicate that enables lanes, or -1
  i32 to_count, from_count;
  i32 to[8], from[16];        // offsets in the register file, or numbers of predicates; to: -1 drops the value
  i32 target, reconvergence;  // of branches: where to, and where the lanes meet again; -1: at the end
  i32 bytes, count;           // of a memory access: size of an element, number of elements
  i32 order, register_bytes;  // bits of Order; width of the registers that hold an element
  i32 is_signed, variant;     // whether a narrow element is extended by its sign; what else an operation needs
  i64 displacement;           // added to the address
};

struct Schedule {
  u64 seed;
  i32 policy, quantum, resident;      // see scheduler.h; instructions a turn; blocks at a time, 0: all
  i32 first_blocks;                   // run so many blocks of the grid only, 0: all
  i32 favoured;                       // the block that policies AHEAD and BEHIND are about
  i32 races, stale_l1, late_stores;   // detect races; keep L1 lines until an acquire; hold stores back until a release
  i32 poison_racing;                  // a plain load that races returns NaN
  i32 approximation;                  // results of .approx and .full instructions are off by up to so many ulp
  u64 most_instructions;
};

// What one block asked of the hardware at one instruction, its warps and visits added up.
struct Counts {
  u64 executions, lanes;               // a warp each; of these the lanes that took part
  u64 wavefronts_low, wavefronts_high;  // of shared memory; see count.h
  u64 sectors;                         // of 32 bytes of global memory
  u64 bytes;                           // given: those of a lane's access, where the assembler has merged several; or 0
};

struct Launch {
  const Instruction* program;
  i32 length;
  const u8* registers;          // the register file of a warp as it starts: constants are filled in
  i32 register_bytes;
  const Mask* predicates;
  i32 predicate_count;
  const i32* specials;          // pairs: offset in the register file, number of the special register
  i32 special_count;
  u64 base, size;               // of global memory: address of its first byte, bytes
  u8 *memory, *state;           // state: bits of MemoryState, a byte each
  const u8* parameters;
  u64 parameter_bytes;
  u32 grid[3];
  u32 threads, shared_bytes, local_bytes;
  i32 global_grain, shared_grain;  // bytes that races are told apart by
  i32 counted;                     // the block that is counted
  Counts* counts;                  // of every instruction, or nullptr
};

enum MemoryState { ALLOCATED = 1, WRITTEN = 2 };

// One kind of finding at one pair of instructions; the first of `count`.
struct Finding {
  i32 kind, reach, space;
  i32 first, second;  // instructions; -1: none
  i32 first_block, first_thread, second_block, second_thread;
  i32 same_value;     // both stores wrote the same bits, every time
  u64 address, count;
};

enum Kind {
  WRITE_THEN_READ, READ_THEN_WRITE, TWO_WRITES, ATOMIC_AND_PLAIN, OUT_OF_BOUNDS, UNWRITTEN, MISALIGNED,
  DIVERGENT_BARRIER, MIXED_BARRIERS, BARRIER_AFTER_EXIT, DEADLOCK, ABSENT_LANES, COPY_UNDER_WAY, DIVISION_BY_ZERO,
  TOO_LONG,
};
enum Reach { NO_REACH, IN_WARP, IN_BLOCK, IN_GRID };

struct Statistics {
  u64 instructions, accesses, barriers, stale_reads, poisoned_reads;
};
