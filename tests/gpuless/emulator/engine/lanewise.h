// Arithmetic of PTX that C++ does not have, and the table of lanewise.def.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "interface.h"

typedef u16 b16;
typedef u32 b32;
typedef u64 b64;
typedef i16 s16;
typedef i32 s32;
typedef i64 s64;

template <class To, class From> inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a value keeps its bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

template <class T> inline T to_integer(f32 x, T of_nan) {  // toward zero, saturating
  const f32 limit = (f32)std::numeric_limits<T>::max();    // rounded up to the power of two
  if (x != x) return of_nan;
  return x >= limit ? std::numeric_limits<T>::max() : x < -limit ? std::numeric_limits<T>::min() : (T)x;
}
inline u32 to_tf32(f32 x) {  // to nearest, halves away from zero
  u32 b = bits<u32>(x);
  return (b & 0x7f800000u) == 0x7f800000u ? b : (b + 0x1000u) & 0xffffe000u;
}
inline u16 to_bf16(f32 x) {  // to nearest even
  u32 b = bits<u32>(x);
  return x != x ? 0x7fff : (u16)((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}
inline f32 from_bf16(u16 x) { return bits<f32>((u32)x << 16); }
inline u16 to_f16(f32 x) {  // to nearest even
  u16 sign = bits<u32>(x) >> 16 & 0x8000;
  f64 a = std::fabs((f64)x);
  if (x != x) return 0x7fff;
  if (a >= 65520.0) return sign | 0x7c00;
  int exponent = a > 0 ? std::max(std::ilogb(a), -14) : -14;
  i32 units = (i32)std::nearbyint(std::ldexp(a, 10 - exponent));  // of the last place; 1024..2048 where normal
  return sign | (u16)(units + ((exponent + 14) << 10));
}
inline f32 from_f16(u16 x) {
  int exponent = x >> 10 & 31, fraction = x & 1023;
  f64 a = exponent == 31  ? (fraction ? NAN : INFINITY)
          : exponent == 0 ? std::ldexp((f64)fraction, -24)
                          : std::ldexp((f64)(1024 + fraction), exponent - 25);
  return (f32)(x & 0x8000 ? -a : a);
}
inline f32 flushed(f32 x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
template <class T> inline T smaller(T x, T y) {  // -0 is smaller than +0, and a number than NaN
  return x != x ? y : y != y ? x : x == y ? (std::signbit(x) ? x : y) : x < y ? x : y;
}
template <class T> inline T larger(T x, T y) {
  return x != x ? y : y != y ? x : x == y ? (std::signbit(x) ? y : x) : x > y ? x : y;
}
inline u32 bit_field(u32 x, u32 first, u32 length, bool is_signed) {
  u32 fill = is_signed && length ? x >> std::min(first + length - 1, 31u) & 1 : 0, result = 0;
  for (u32 i = 0; i < 32; i++) result |= (i < length && first + i < 32 ? x >> (first + i) & 1 : fill) << i;
  return result;
}
inline u32 permuted_bytes(u32 x, u32 y, u32 selectors) {
  u64 both = (u64)y << 32 | x;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = selectors >> 4 * i & 15, byte = both >> (selector & 7) * 8 & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline u32 reversed_bits(u32 x) {
  u32 result = 0;
  for (int i = 0; i < 32; i++) result |= (x >> i & 1) << (31 - i);
  return result;
}
template <class F> inline u64 in_pairs(u64 x, u64 y, u64 z, F f) {
  u32 low = bits<u32>(f(bits<f32>((u32)x), bits<f32>((u32)y), bits<f32>((u32)z)));
  u32 high = bits<u32>(f(bits<f32>((u32)(x >> 32)), bits<f32>((u32)(y >> 32)), bits<f32>((u32)(z >> 32))));
  return (u64)high << 32 | low;
}

// How many ulp an approximation may be off, and what chooses how many it is: the same for the same operands.
thread_local i32 approximation_ulp = 0;
thread_local u64 approximation_seed = 0;
inline f32 approximately(f32 exact, f32 x, f32 y) {
  if (!approximation_ulp || !std::isfinite(exact) || exact == 0) return exact;
  u64 hash = (((u64)bits<u32>(x) << 32 | bits<u32>(y)) ^ approximation_seed) * 0x9E3779B97F4A7C15ull;
  hash = (hash ^ hash >> 29) * 0xBF58476D1CE4E5B9ull;
  f32 off = bits<f32>(bits<u32>(exact) + (i32)((hash >> 40) % (2 * approximation_ulp + 1)) - approximation_ulp);
  return std::isfinite(off) ? off : exact;
}
