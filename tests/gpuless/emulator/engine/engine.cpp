// Runs a launch: blocks and warps take turns in an order that a schedule draws.
#include "operations.h"

enum Policy {
  ROTATION,  // each warp in its turn
  RANDOM,    // any, for turns of random length
  SKEWED,    // as RANDOM, but some blocks and warps are far faster than others, for a while
  AHEAD,     // one block runs whenever it can
  BEHIND,    // one block runs only while all others wait for it
};

void Machine::start(Block& block) {
  block.shared.start(launch, schedule.races);
  block.view.start(global, schedule.stale_l1, schedule.late_stores);
  block.warps.resize(launch.threads / LANES);
  for (u32 i = 0; i < block.warps.size(); i++) {
    Warp& warp = block.warps[i];
    warp.start(block, i, launch);
    const u32 coordinates[] = {0,       0,         0, block.x, block.y, block.z, launch.grid[0], launch.grid[1], launch.grid[2],
                               launch.threads, 1, 1};
    for (i32 s = 0; s < launch.special_count; s++)
      for (int lane = 0; lane < LANES; lane++) {
        i32 place = launch.specials[2 * s], number = launch.specials[2 * s + 1];
        warp.at<u32>(place)[lane] = number == 0 ? i * LANES + lane : number == 12 ? lane : coordinates[number];
      }
  }
}

void Machine::finish(Block& block) {
  block.view.release();
  block.view = View();
  block.shared = SharedMemory();
  block.warps.clear();
}

// Lets the block's warps pass its barrier once all that have not ended wait there.
void Machine::arrive(Block& block) {
  i32 instruction = -1, other = -1;
  bool some_ended = false;
  for (Warp& warp : block.warps) {
    if (warp.ended()) {
      some_ended = true;
    } else if (!warp.waiting) {
      return;
    } else if (instruction < 0) {
      instruction = warp.pc;
    } else if (warp.pc != instruction) {
      other = warp.pc;
    }
  }
  if (instruction < 0) return;
  if (other >= 0) report(MIXED_BARRIERS, NO_REACH, -1, instruction, other, block.index, -1, block.index, -1, false, 0);
  if (some_ended) report(BARRIER_AFTER_EXIT, NO_REACH, -1, -1, instruction, -1, -1, block.index, -1, false, 0);
  block.clock.barrier();
  statistics.barriers++;
  for (Warp& warp : block.warps)
    if (!warp.ended()) warp.waiting = false, warp.warp_barrier = warp.clock++, warp.go_to(warp.pc + 1);
}

void Machine::complete(Warp& w, std::vector<Copy>& group) {
  i32 pc = w.pc;
  SharedMemory& shared = w.block->shared;
  for (const Copy& copy : group) {
    u8 data[16] = {0};
    w.pc = copy.instruction;
    if (copy.given) load_global(w, copy.lane, copy.from, copy.given, data);
    if (schedule.races)
      for (u32 place = copy.to / shared.grain; place * shared.grain < copy.to + copy.bytes; place++)
        shared.cells[place].copies--;
    store_shared(w, copy.lane, copy.to, copy.bytes, data);
  }
  w.pc = pc;
  group.clear();
}

void Machine::turn(Warp& warp, int instructions) {
  static const std::vector<Operation>& table = operations();
  warp.yields = false;
  while (instructions-- > 0 && !warp.yields && !stopped) {
    const Instruction& in = launch.program[warp.pc];
    Mask lanes = warp.active;
    if (in.guard >= 0) lanes &= in.negated ? ~warp.predicates[in.guard] : warp.predicates[in.guard];
    warp.jumped = false;
    if (Counts* c = counts(warp)) c->executions++, c->lanes += __builtin_popcount(lanes);
    table[in.operation].run(*this, warp, in, lanes);
    if (!warp.jumped) warp.go_to(warp.pc + 1);
    if (++statistics.instructions >= schedule.most_instructions) {
      fault(warp, 0, TOO_LONG, -1, 0);
      stopped = true;
    }
  }
}

class Scheduler {
 public:
  explicit Scheduler(Machine& machine) : machine(machine), schedule(machine.schedule) {
    size_t most = schedule.first_blocks > 0 ? schedule.first_blocks : machine.blocks.size();
    for (Block& block : machine.blocks)
      if (block.index < most) waiting.push_back(&block);
    if (schedule.policy != ROTATION) std::shuffle(waiting.begin(), waiting.end(), machine.random);
    std::reverse(waiting.begin(), waiting.end());  // the next one is the last
  }

  void run() {
    while (!machine.stopped) {
      fill();
      if (resident.empty()) return;
      if (schedule.policy == SKEWED && turns++ % 1000 == 0) change_speeds();
      Warp* warp = choose();
      if (!warp) return report_deadlock();
      int length = schedule.policy == ROTATION ? schedule.quantum : 1 + machine.random() % (2 * schedule.quantum);
      machine.turn(*warp, length);
      if (warp->block->ended()) {
        Block* block = warp->block;
        machine.finish(*block);
        resident.erase(std::find(resident.begin(), resident.end(), block));
      }
    }
  }

 private:
  Machine& machine;
  const Schedule& schedule;
  std::vector<Block*> waiting, resident;
  std::vector<std::pair<double, Warp*>> candidates;  // with the sum of weights up to it
  u64 turns = 0;

  void fill() {
    size_t most = schedule.resident > 0 ? schedule.resident : machine.blocks.size();
    while (resident.size() < most && !waiting.empty()) {
      machine.start(*waiting.back());
      resident.push_back(waiting.back());
      waiting.pop_back();
    }
  }
  void change_speeds() {
    std::normal_distribution<double> normal(0, 1);
    for (Block* block : resident) {
      block->weight = std::exp(3 * normal(machine.random));
      for (Warp& warp : block->warps) warp.weight = std::exp(2 * normal(machine.random));
    }
  }
  double weight(const Block& block, const Warp& warp) const {
    bool favoured = (int)block.index == schedule.favoured;
    switch (schedule.policy) {
      case AHEAD: return favoured ? (warp.spinning ? 1e-3 : 1e6) : 1;
      case BEHIND: return warp.spinning ? 1e-12 : favoured ? 1e-6 : 1;
      default: return block.weight * warp.weight * (warp.spinning ? 0.05 : 1);
    }
  }
  Warp* choose() {
    double sum = 0;
    candidates.clear();
    for (Block* block : resident)
      for (Warp& warp : block->warps)
        if (!warp.ended() && !warp.waiting) candidates.emplace_back(sum += weight(*block, warp), &warp);
    if (candidates.empty()) return nullptr;
    if (schedule.policy == ROTATION) return candidates[turns++ % candidates.size()].second;
    double drawn = std::uniform_real_distribution<double>(0, sum)(machine.random);
    auto chosen = std::lower_bound(candidates.begin(), candidates.end(), std::make_pair(drawn, (Warp*)nullptr));
    return chosen == candidates.end() ? candidates.back().second : chosen->second;
  }
  void report_deadlock() {
    for (Block* block : resident)
      for (Warp& warp : block->warps)
        if (warp.waiting) machine.fault(warp, 0, DEADLOCK, -1, 0);
    machine.stopped = true;
  }
};

extern "C" {
// The table of operations, one by one; nullptr past its end.
const char* operation_name(i32 i) { return i < (i32)operations().size() ? operations()[i].name : nullptr; }
const char* operation_signature(i32 i) { return operations()[i].signature; }

// Runs a launch; returns the number of findings, of which at most `most` are stored.
i32 run_launch(const Launch* launch, const Schedule* schedule, Finding* findings, i32 most, Statistics* statistics) {
  approximation_ulp = schedule->approximation, approximation_seed = schedule->seed;
  Machine machine(*launch, *schedule);
  Scheduler(machine).run();
  i32 count = 0;
  for (auto& [key, finding] : machine.findings) {
    if (count < most) findings[count] = finding;
    count++;
  }
  *statistics = machine.statistics;
  return count;
}
}
