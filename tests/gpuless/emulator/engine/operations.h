// What instructions do, as a table by their names: those of lanewise.def, and here those that touch memory, other lanes or
// the order of execution. The decoder in ptx.py reads the table, so that an instruction is known in one place.
#pragma once
#include <string>
#include <utility>

#include "lanewise.h"
#include "machine.h"

struct Operation {
  const char *name, *signature;  // result=operands by type; empty where ptx.py knows the operands
  void (*run)(Machine&, Warp&, const Instruction&, Mask);
};

// --- lane by lane

struct pred {};
template <class T> struct Lanes {
  typedef T Value;
  const T* registers;
  Lanes(Warp& w, i32 place) : registers(w.at<T>(place)) {}
  T operator[](int lane) const { return registers[lane]; }
};
template <> struct Lanes<pred> {
  typedef u32 Value;
  Mask mask;
  Lanes(Warp& w, i32 place) : mask(w.predicates[place]) {}
  u32 operator[](int lane) const { return mask >> lane & 1; }
};

inline void set(Mask& predicate, Mask lanes, Mask value) { predicate = (predicate & ~lanes) | (value & lanes); }

template <class Result, class... Operands, class F, size_t... I>
inline void compute(Warp& w, const Instruction& in, Mask lanes, F f, std::index_sequence<I...>) {
  std::tuple<Lanes<Operands>...> from{Lanes<Operands>(w, in.from[I])...};
  if constexpr (std::is_same_v<Result, pred>) {
    Mask result = 0;
    for (int l = 0; l < LANES; l++) result |= ((Mask)f(std::get<I>(from)[l]...) & 1) << l;
    set(w.predicates[in.to[0]], lanes, result);
  } else {
    Result* to = w.at<Result>(in.to[0]);
    if (lanes == ~0u) {
#pragma GCC ivdep
      for (int l = 0; l < LANES; l++) to[l] = (Result)f(std::get<I>(from)[l]...);
    } else {
      for (int l = 0; l < LANES; l++)
        if (lanes >> l & 1) to[l] = (Result)f(std::get<I>(from)[l]...);
    }
  }
}
template <class Result, class... Operands, class F>
inline void lanewise(Warp& w, const Instruction& in, Mask lanes, F f) {
  compute<Result, Operands...>(w, in, lanes, f, std::index_sequence_for<Operands...>{});
}

template <class F> inline void each(Mask lanes, F f) {
  for (int l = 0; l < LANES; l++)
    if (lanes >> l & 1) f(l);
}

template <class T, bool REMAINDER> void divide(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  T *x = w.at<T>(in.from[0]), *y = w.at<T>(in.from[1]), *to = w.at<T>(in.to[0]);
  each(lanes, [&](int l) {
    if (y[l] == 0) machine.fault(w, l, DIVISION_BY_ZERO, -1, 0), to[l] = (T)-1;
    else if (std::is_signed_v<T> && y[l] == (T)-1) to[l] = REMAINDER ? 0 : (T)(0 - (u64)x[l]);  // the smallest overflows
    else to[l] = REMAINDER ? x[l] % y[l] : x[l] / y[l];
  });
}

// --- control

inline void branch(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  w.branch(in.target, in.reconvergence, lanes, machine.random() & 1);
  w.jumped = true;
}
inline void leave(Machine& machine, Warp& w, const Instruction&, Mask lanes) {
  w.exit(lanes);
  w.jumped = true;
  if (w.ended()) {
    for (auto& group : w.groups) machine.complete(w, group);
    machine.complete(w, w.copies);
    w.yields = true;
    machine.arrive(*w.block);
  }
}
inline void block_barrier(Machine& machine, Warp& w, const Instruction&, Mask lanes) {
  if (lanes != w.live) {
    machine.fault(w, 0, DIVERGENT_BARRIER, -1, lanes);
    machine.stopped = true;
  }
  w.waiting = w.jumped = w.yields = true;
  w.spinning = false;
  machine.arrive(*w.block);
}
inline void warp_barrier(Machine& machine, Warp& w, const Instruction&, Mask lanes) {
  if (lanes != w.live) machine.fault(w, 0, ABSENT_LANES, -1, lanes);
  w.warp_barrier = w.clock++;
}
inline void nothing(Machine&, Warp&, const Instruction&, Mask) {}
// Registers of `bytes` each make one wide register, or it them; the first has the low bits.
inline void pack(Machine&, Warp& w, const Instruction& in, Mask lanes) {
  each(lanes, [&](int l) {
    u8* to = w.registers + in.to[0] + l * in.bytes * in.count;
    for (int k = 0; k < in.count; k++) memcpy(to + k * in.bytes, w.registers + in.from[k] + l * in.bytes, in.bytes);
  });
}
inline void unpack(Machine&, Warp& w, const Instruction& in, Mask lanes) {
  each(lanes, [&](int l) {
    const u8* from = w.registers + in.from[0] + l * in.bytes * in.count;
    for (int k = 0; k < in.count; k++)
      if (in.to[k] >= 0) memcpy(w.registers + in.to[k] + l * in.bytes, from + k * in.bytes, in.bytes);
  });
}
inline void global_timer(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  each(lanes, [&](int l) { w.at<u64>(in.to[0])[l] = machine.statistics.instructions; });
}

// --- memory

inline u64 extended(const u8* from, const Instruction& in) {
  u64 value = 0;
  memcpy(&value, from, in.bytes);
  if (!in.is_signed || in.bytes == 8) return value;
  int unused = 64 - 8 * in.bytes;
  return (u64)((i64)(value << unused) >> unused);
}
inline void to_registers(Warp& w, const Instruction& in, int lane, const u8* data) {
  for (int k = 0; k < in.count; k++) {
    if (in.to[k] < 0) continue;
    u64 value = extended(data + k * in.bytes, in);
    memcpy(w.registers + in.to[k] + lane * in.register_bytes, &value, in.register_bytes);
  }
}
inline void from_registers(Warp& w, const Instruction& in, int lane, u8* data) {
  for (int k = 0; k < in.count; k++)
    memcpy(data + k * in.bytes, w.registers + in.from[1 + k] + lane * in.register_bytes, in.bytes);
}

inline void load_parameter(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  u32 length = in.bytes * in.count;
  each(lanes, [&](int l) {
    u64 offset = w.at<u64>(in.from[0])[l] + in.displacement;
    if (offset + length > machine.launch.parameter_bytes || offset + length < length)
      return machine.fault(w, l, OUT_OF_BOUNDS, PARAMETERS, offset);
    to_registers(w, in, l, machine.launch.parameters + offset);
  });
}

inline void load_global(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  if (Counts* c = machine.counts(w)) count_global(*c, w.at<u64>(in.from[0]), in.displacement, lanes, in.bytes * in.count);
  u32 length = in.bytes * in.count;
  each(lanes, [&](int l) {
    u8 data[64];
    u64 offset, address = w.at<u64>(in.from[0])[l] + in.displacement;
    if (!machine.global_offset(w, l, address, length, offset)) {
      memset(data, 0xff, length);
    } else if (in.order & STRONG) {
      machine.check_global(w, l, offset, length, Access::STRONG_READ);
      w.block->view.settle(offset, length);
      memcpy(data, machine.global.bytes + offset, length);
      if (in.order & ACQUIRE) {
        machine.races.acquire(offset, w.block->clock, machine.actor(w, l).thread);
        w.block->view.acquire();
      }
      w.spinning = w.yields = true;
    } else {
      machine.load_global(w, l, offset, length, data);
    }
    to_registers(w, in, l, data);
  });
  machine.statistics.accesses++, w.clock++;
}

inline void store_global(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  if (Counts* c = machine.counts(w)) count_global(*c, w.at<u64>(in.from[0]), in.displacement, lanes, in.bytes * in.count);
  u32 length = in.bytes * in.count;
  each(lanes, [&](int l) {
    u8 data[64];
    from_registers(w, in, l, data);
    u64 offset, address = w.at<u64>(in.from[0])[l] + in.displacement;
    if (!machine.global_offset(w, l, address, length, offset)) return;
    if (in.order & STRONG) {
      machine.races.overwrite(offset);
      if (in.order & RELEASE) {
        w.block->view.release();
        machine.races.release(offset, machine.actor(w, l));
      }
      machine.check_global(w, l, offset, length, Access::STRONG_WRITE, data);
      w.block->view.settle(offset, length);
      memcpy(machine.global.bytes + offset, data, length);
      machine.global.mark_written(offset, length);
    } else {
      machine.check_global(w, l, offset, length, Access::WRITE, data);
      w.block->view.write(offset, length, data);
    }
  });
  machine.statistics.accesses++, w.clock++;
}

enum Atomic { ADD, ADD_F32, ADD_F64, EXCHANGE, COMPARE_AND_SWAP, MIN_S, MAX_S, MIN_U, MAX_U, MIN_F, MAX_F, AND, OR, XOR };
inline u64 updated(int what, u64 old, u64 value, u64 swap, int bytes) {
  i64 s_old = bytes == 4 ? (i32)old : (i64)old, s_value = bytes == 4 ? (i32)value : (i64)value;
  switch (what) {
    case ADD: return old + value;
    case ADD_F32: return bits<u32>(bits<f32>((u32)old) + bits<f32>((u32)value));
    case ADD_F64: return bits<u64>(bits<f64>(old) + bits<f64>(value));
    case EXCHANGE: return value;
    case COMPARE_AND_SWAP: return old == value ? swap : old;
    case MIN_S: return (u64)std::min(s_old, s_value);
    case MAX_S: return (u64)std::max(s_old, s_value);
    case MIN_U: return std::min(old, value);
    case MAX_U: return std::max(old, value);
    case MIN_F: return bits<u32>(smaller(bits<f32>((u32)old), bits<f32>((u32)value)));
    case MAX_F: return bits<u32>(larger(bits<f32>((u32)old), bits<f32>((u32)value)));
    case AND: return old & value;
    case OR: return old | value;
    default: return old ^ value;
  }
}
inline void atomic(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  if (Counts* c = machine.counts(w)) count_global(*c, w.at<u64>(in.from[0]), in.displacement, lanes, in.bytes * in.count);
  each(lanes, [&](int l) {
    u64 offset, address = w.at<u64>(in.from[0])[l] + in.displacement;
    u32 length = in.bytes * in.count;
    if (!machine.global_offset(w, l, address, length, offset)) return;
    Actor who = machine.actor(w, l);
    if (in.order & RELEASE) w.block->view.release();
    machine.check_global(w, l, offset, length, Access::STRONG_WRITE);
    w.block->view.settle(offset, length);
    if (in.order & ACQUIRE) {  // of what was there before, not of the own release
      machine.races.acquire(offset, w.block->clock, who.thread);
      w.block->view.acquire();
    }
    if (in.order & RELEASE) machine.races.release(offset, who);
    for (int k = 0; k < in.count; k++) {
      u64 old = 0, value = 0, swap = 0;
      u8* place = machine.global.bytes + offset + k * in.bytes;
      memcpy(&old, place, in.bytes);
      memcpy(&value, w.registers + in.from[1 + k] + l * in.register_bytes, in.bytes);
      if (in.variant == COMPARE_AND_SWAP) memcpy(&swap, w.registers + in.from[2] + l * in.register_bytes, in.bytes);
      u64 result = updated(in.variant, old, value, swap, in.bytes);
      memcpy(place, &result, in.bytes);
      if (k < in.to_count && in.to[k] >= 0) memcpy(w.registers + in.to[k] + l * in.register_bytes, &old, in.bytes);
    }
  });
  machine.statistics.accesses++, w.clock++;
  w.spinning = false;
}

inline void load_shared(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  if (Counts* c = machine.counts(w)) count_shared(*c, w.at<u32>(in.from[0]), (u32)in.displacement, lanes, in.bytes * in.count);
  u32 length = in.bytes * in.count;
  each(lanes, [&](int l) {
    u8 data[64];
    u32 offset, address = w.at<u32>(in.from[0])[l] + (u32)in.displacement;
    if (machine.shared_offset(w, l, address, length, offset))
      machine.load_shared(w, l, offset, length, data, in.variant ? (u32)in.variant : ~0u);
    else memset(data, 0xff, length);
    to_registers(w, in, l, data);
  });
  machine.statistics.accesses++, w.clock++;
}
inline void store_shared(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  if (Counts* c = machine.counts(w)) count_shared(*c, w.at<u32>(in.from[0]), (u32)in.displacement, lanes, in.bytes * in.count);
  u32 length = in.bytes * in.count;
  each(lanes, [&](int l) {
    u8 data[64];
    from_registers(w, in, l, data);
    u32 offset, address = w.at<u32>(in.from[0])[l] + (u32)in.displacement;
    if (machine.shared_offset(w, l, address, length, offset)) machine.store_shared(w, l, offset, length, data);
  });
  machine.statistics.accesses++, w.clock++;
}
template <bool STORE> void access_local(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  u32 length = in.bytes * in.count;
  each(lanes, [&](int l) {
    u64 offset = w.at<u64>(in.from[0])[l] + in.displacement;
    if (offset + length > machine.launch.local_bytes) return machine.fault(w, l, OUT_OF_BOUNDS, LOCAL, offset);
    u8* place = &w.local[(size_t)l * machine.launch.local_bytes + offset];
    STORE ? from_registers(w, in, l, place) : to_registers(w, in, l, place);
  });
}

// 8x8 matrices of 16 bits: lane 8 k + i has the address of row i of matrix k; lane l gets, or gives, numbers 2 (l % 4) and
// the next of row l / 4, or of that column where `variant` says transposed.
template <bool STORE> void matrix(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  if (Counts* c = machine.counts(w)) count_matrices(*c, w.at<u32>(in.from[0]), (u32)in.displacement, in.count);
  if (lanes != ~0u) machine.fault(w, 0, ABSENT_LANES, -1, lanes);
  u32 addresses[LANES];
  memcpy(addresses, w.at<u32>(in.from[0]), sizeof addresses);
  for (int k = 0; k < in.count; k++)
    for (int i = 0; i < 8; i++) {
      u32 offset, address = addresses[8 * k + i] + (u32)in.displacement;
      if (!machine.shared_offset(w, 8 * k + i, address, 16, offset)) continue;
      u16 row[8];
      u16* held = w.at<u16>(STORE ? in.from[1 + k] : in.to[k]);  // two a lane
      auto place = [&](int j) -> u16& { return in.variant ? held[8 * j + i] : held[8 * i + j]; };
      if (STORE) {
        for (int j = 0; j < 8; j++) row[j] = place(j);
        machine.store_shared(w, 8 * k + i, offset, 16, (u8*)row);
      } else {
        machine.load_shared(w, 8 * k + i, offset, 16, (u8*)row);
        for (int j = 0; j < 8; j++) place(j) = row[j];
      }
    }
  machine.statistics.accesses++, w.clock++;
}

inline void start_copy(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  if (Counts* c = machine.counts(w)) {
    count_shared(*c, w.at<u32>(in.from[0]), (u32)in.displacement, lanes, in.bytes);
    count_global(*c, w.at<u64>(in.from[1]), in.target, lanes, in.bytes);
  }
  each(lanes, [&](int l) {
    u32 to, address = w.at<u32>(in.from[0])[l] + (u32)in.displacement;
    u32 given = in.from_count > 2 ? std::min((u32)in.bytes, w.at<u32>(in.from[2])[l]) : in.bytes;
    u64 from = 0, source = w.at<u64>(in.from[1])[l] + in.target;
    if (!machine.shared_offset(w, l, address, in.bytes, to)) return;
    if (given && !machine.global_offset(w, l, source, given, from)) given = 0;
    if (given) machine.check_global(w, l, from, given, Access::READ);
    SharedMemory& shared = w.block->shared;
    u8 nothing_yet[16];
    memset(nothing_yet, 0xff, sizeof nothing_yet);  // whoever reads too soon gets NaN
    machine.store_shared(w, l, to, in.bytes, nothing_yet);
    memset(&shared.written[to], 0, in.bytes);
    if (machine.schedule.races)
      for (u32 place = to / shared.grain; place * shared.grain < to + in.bytes; place++) shared.cells[place].copies++;
    w.copies.push_back(Copy{to, (u32)in.bytes, from, given, l, w.pc});
  });
  machine.statistics.accesses++, w.clock++;
}
inline void commit_copies(Machine&, Warp& w, const Instruction&, Mask) {
  w.groups.push_back(std::move(w.copies));
  w.copies.clear();
}
inline void wait_for_copies(Machine& machine, Warp& w, const Instruction& in, Mask) {
  while ((int)w.groups.size() > in.variant) {
    machine.complete(w, w.groups.front());
    w.groups.erase(w.groups.begin());
  }
  w.clock++;
}

// --- between lanes

enum Shuffle { INDEX, UP, DOWN, BUTTERFLY };
inline void shuffle(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  u32 *value = w.at<u32>(in.from[0]), *lane = w.at<u32>(in.from[1]), *clamp = w.at<u32>(in.from[2]);
  u32 *members = w.at<u32>(in.from[3]), result[LANES];
  Mask valid = 0;
  each(lanes, [&](int l) {
    int b = lane[l] & 31, c = clamp[l] & 31, segment = clamp[l] >> 8 & 31;
    int last = (l & segment) | (c & ~segment), first = l & segment, source;
    bool in_range;
    if (members[l] & ~lanes) machine.fault(w, l, ABSENT_LANES, -1, members[l]);
    switch (in.variant) {
      case INDEX: source = first | (b & ~segment), in_range = source <= last; break;
      case UP: source = l - b, in_range = source >= last; break;
      case DOWN: source = l + b, in_range = source <= last; break;
      default: source = l ^ b, in_range = source <= last;
    }
    if (!in_range) source = l;
    if (!(lanes >> source & 1)) machine.fault(w, l, ABSENT_LANES, -1, source);
    result[l] = value[source];
    valid |= (Mask)in_range << l;
  });
  each(lanes, [&](int l) { w.at<u32>(in.to[0])[l] = result[l]; });
  if (in.to_count > 1) set(w.predicates[in.to[1]], lanes, valid);
}
inline void reduce(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  u32 *value = w.at<u32>(in.from[0]), *members = w.at<u32>(in.from[1]);
  u64 result = 0;
  bool first = true;
  each(lanes, [&](int l) {
    if (members[l] != lanes) machine.fault(w, l, ABSENT_LANES, -1, members[l]);
    result = first ? value[l] : updated(in.variant, result, value[l], 0, 4);
    first = false;
  });
  each(lanes, [&](int l) { w.at<u32>(in.to[0])[l] = (u32)result; });
}

// D = A B + C of 16x8 by K: products are exact, their sum with C is rounded once. Lane l holds rows l / 4 and l / 4 + 8.
inline f64 tf32(u32 b) { return bits<f32>(b & 0xffffe000u); }
enum Element { TF32, BF16, F16 };
template <int ELEMENT, int K> void multiply(Machine& machine, Warp& w, const Instruction& in, Mask lanes) {
  if (lanes != ~0u) machine.fault(w, 0, ABSENT_LANES, -1, lanes);
  const int PER_REGISTER = ELEMENT == TF32 ? 1 : 2, STEP = 4 * PER_REGISTER;  // columns of A that four lanes hold
  const int A_REGISTERS = 2 * K / STEP, B_REGISTERS = K / STEP;
  auto number = [&](i32 place, int l, int i) -> f64 {
    u32 held = w.at<u32>(place)[l];
    return ELEMENT == TF32 ? tf32(held) : ELEMENT == BF16 ? from_bf16(held >> 16 * i) : from_f16(held >> 16 * i);
  };
  f64 a[16][K], b[K][8], d[16][8];
  for (int l = 0; l < LANES; l++) {
    int group = l / 4, member = l % 4;
    for (int r = 0; r < A_REGISTERS; r++)
      for (int i = 0; i < PER_REGISTER; i++)
        a[group + 8 * (r % 2)][STEP * (r / 2) + PER_REGISTER * member + i] = number(in.from[r], l, i);
    for (int r = 0; r < B_REGISTERS; r++)
      for (int i = 0; i < PER_REGISTER; i++)
        b[STEP * r + PER_REGISTER * member + i][group] = number(in.from[A_REGISTERS + r], l, i);
    for (int r = 0; r < 4; r++)
      d[group + 8 * (r / 2)][2 * member + r % 2] = w.at<f32>(in.from[A_REGISTERS + B_REGISTERS + r])[l];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < K; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < LANES; l++)
    for (int r = 0; r < 4; r++) w.at<f32>(in.to[r])[l] = (f32)d[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
}

// --- the table

inline const std::vector<Operation>& operations() {
#define RUN [](Machine&, Warp & w, const Instruction& in, Mask lanes)
#define VALUE_OF(T) [[maybe_unused]] Lanes<T>::Value
#define ONE(NAME, D, A, VALUE) \
  {NAME, #D "=" #A, RUN { lanewise<D, A>(w, in, lanes, [](VALUE_OF(A) x) { return VALUE; }); }},
#define TWO(NAME, D, A, B, VALUE) \
  {NAME, #D "=" #A "," #B, RUN { lanewise<D, A, B>(w, in, lanes, [](VALUE_OF(A) x, VALUE_OF(B) y) { return VALUE; }); }},
#define TEST(NAME, A, VALUE) TWO(NAME, pred, A, A, VALUE)
#define THREE(NAME, D, A, B, C, VALUE) \
  {NAME, #D "=" #A "," #B "," #C, RUN { \
     lanewise<D, A, B, C>(w, in, lanes, [](VALUE_OF(A) x, VALUE_OF(B) y, VALUE_OF(C) z) { return VALUE; }); }},
#define DIVISION(T) \
  {"div." #T, #T "=" #T "," #T, divide<T, false>}, {"rem." #T, #T "=" #T "," #T, divide<T, true>},
  static const std::vector<Operation> table = {
#include "lanewise.def"
      DIVISION(s32) DIVISION(u32) DIVISION(s64) DIVISION(u64)
      {"bra", "", branch},
      {"ret", "", leave},
      {"bar.sync", "", block_barrier},
      {"bar.warp.sync", "", warp_barrier},
      {"createpolicy", "", nothing},
      {"mov.globaltimer", "", global_timer},
      {"mov.pack", "", pack},
      {"mov.unpack", "", unpack},
      {"ld.param", "", load_parameter},
      {"ld.global", "", load_global},
      {"st.global", "", store_global},
      {"atom.global", "", atomic},
      {"ld.shared", "", load_shared},
      {"st.shared", "", store_shared},
      {"ld.local", "", access_local<false>},
      {"st.local", "", access_local<true>},
      {"ldmatrix", "", matrix<false>},
      {"stmatrix", "", matrix<true>},
      {"cp.async", "", start_copy},
      {"cp.async.commit_group", "", commit_copies},
      {"cp.async.wait_group", "", wait_for_copies},
      {"shfl.sync", "", shuffle},
      {"redux.sync", "", reduce},
      {"mma.m16n8k8.tf32", "", multiply<TF32, 8>},
      {"mma.m16n8k8.bf16", "", multiply<BF16, 8>},
      {"mma.m16n8k16.bf16", "", multiply<BF16, 16>},
      {"mma.m16n8k8.f16", "", multiply<F16, 8>},
      {"mma.m16n8k16.f16", "", multiply<F16, 16>},
  };
  return table;
}
