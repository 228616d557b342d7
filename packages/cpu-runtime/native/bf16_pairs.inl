// Included by attention.inl: bf16 numbers two by two, and products that sum over both of a pair at once, in order.
// Where the processor has no such product, two multiply-adds of the widened numbers take its place.
#pragma once

#include <cstring>

#include "lanes.inl"

namespace pareto {
namespace {

// To nearest even; a NaN stays one.
inline uint16_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

struct Bf16Pair {
  uint16_t first, second;
};

#if defined(__AVX512F__)

struct Pairs {
  __m512i v;
};

inline Pairs load(const Bf16Pair* from) { return {_mm512_loadu_si512(from)}; }
inline Pairs every(Bf16Pair pair) {
  int bits;
  std::memcpy(&bits, &pair, 4);
  return {_mm512_set1_epi32(bits)};
}
inline Lanes first(Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline Lanes second(Pairs a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

#elif defined(__AVX2__)

struct Pairs {
  __m256i v, w;
};

inline Pairs load(const Bf16Pair* from) {
  const __m256i* both = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(both), _mm256_loadu_si256(both + 1)};
}
inline Pairs every(Bf16Pair pair) {
  int bits;
  std::memcpy(&bits, &pair, 4);
  return {_mm256_set1_epi32(bits), _mm256_set1_epi32(bits)};
}
inline Lanes first(Pairs a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.w, 16))};
}
inline Lanes second(Pairs a) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(a.v, upper)), _mm256_castsi256_ps(_mm256_and_si256(a.w, upper))};
}

#else

struct Pairs {
  Bf16Pair v[kLanes];
};

inline Pairs load(const Bf16Pair* from) {
  Pairs all;
  std::memcpy(all.v, from, sizeof(all.v));
  return all;
}
inline Pairs every(Bf16Pair pair) {
  Pairs all;
  for (Bf16Pair& one : all.v) one = pair;
  return all;
}
inline float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline Lanes first(Pairs a) {
  Lanes all;
  for (int i = 0; i < kLanes; ++i) all.v[i] = widened(a.v[i].first);
  return all;
}
inline Lanes second(Pairs a) {
  Lanes all;
  for (int i = 0; i < kLanes; ++i) all.v[i] = widened(a.v[i].second);
  return all;
}

#endif

#if defined(__AVX512BF16__)
inline Lanes madd(Pairs a, Pairs b, Lanes c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
inline void round_to(uint16_t* to, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
#else
inline Lanes madd(Pairs a, Pairs b, Lanes c) { return madd(second(a), second(b), madd(first(a), first(b), c)); }
inline void round_to(uint16_t* to, Lanes a) {
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < kLanes; ++i) to[i] = bf16_of(lanes[i]);
}
#endif

}  // namespace
}  // namespace pareto
