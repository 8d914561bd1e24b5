// What an access costs: wavefronts of shared memory, sectors of global memory.
//
// Shared memory has 32 banks of 4 bytes, and a wavefront takes one word of each. Words that several lanes want are read
// once. Low: the hardware merges all lanes of a warp. High: it takes accesses of 8 bytes by half a warp at a time and
// those of 16 bytes by a quarter. A GPU lies between the two.
#pragma once
#include <algorithm>

#include "interface.h"

struct Words {  // of one request: what its banks have to give
  u32 words[LANES * 16];
  int count = 0;

  void add(u32 address, u32 length) {
    for (u32 word = address / 4; word <= (address + length - 1) / 4; word++) words[count++] = word;
  }
  u32 wavefronts() {
    u32 banks[LANES] = {0}, most = 0;
    std::sort(words, words + count);
    for (int i = 0; i < count; i++)
      if (!i || words[i] != words[i - 1]) most = std::max(most, ++banks[words[i] % LANES]);
    return most;
  }
};

inline void count_shared(Counts& counts, const u32* addresses, u32 displacement, Mask lanes, u32 length) {
  length = std::max(length, (u32)counts.bytes);
  Words all;
  int together = length <= 4 ? 32 : length == 8 ? 16 : 8;
  for (int first = 0; first < LANES; first += together) {
    Words some;
    for (int l = first; l < first + together; l++)
      if (lanes >> l & 1) {
        u32 address = (addresses[l] + displacement) & ~(length - 1);
        some.add(address, length), all.add(address, length);
      }
    counts.wavefronts_high += some.wavefronts();
  }
  counts.wavefronts_low += all.wavefronts();
}

// Of ldmatrix and stmatrix: eight rows of 16 bytes a matrix, whose addresses eight lanes hold.
inline void count_matrices(Counts& counts, const u32* addresses, u32 displacement, int matrices) {
  for (int k = 0; k < matrices; k++) {
    Words rows;
    for (int i = 0; i < 8; i++) rows.add(addresses[8 * k + i] + displacement, 16);
    u32 taken = rows.wavefronts();
    counts.wavefronts_low += taken, counts.wavefronts_high += taken;
  }
}

inline void count_global(Counts& counts, const u64* addresses, u64 displacement, Mask lanes, u32 length) {
  length = std::max(length, (u32)counts.bytes);
  u64 sectors[2 * LANES];
  int count = 0;
  for (int l = 0; l < LANES; l++) {
    if (!(lanes >> l & 1)) continue;
    u64 address = (addresses[l] + displacement) & ~(u64)(length - 1);
    u64 first = address / 32, last = (address + length - 1) / 32;
    sectors[count++] = first;
    if (last != first) sectors[count++] = last;
  }
  std::sort(sectors, sectors + count);
  counts.sectors += std::unique(sectors, sectors + count) - sectors;
}
