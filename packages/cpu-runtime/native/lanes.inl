// Sixteen floats beside each other, for each instruction set: one register with AVX-512, two with AVX2, four without.
// Multiply-add rounds once where the processor can, so results differ between instruction sets, never within one.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pareto {
namespace {

constexpr int64_t kLanes = 16;

inline float madd(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)

// Tiles of 16 columns that fit into registers beside six rows.
constexpr int kMaxTiles = 4;

struct Lanes {
  __m512 v;
};

inline Lanes zeros() { return {_mm512_setzero_ps()}; }
inline Lanes every(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline Lanes load(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Lanes load(const int8_t* from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
}
inline void store(float* to, Lanes a) { _mm512_storeu_ps(to, a.v); }
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }

#elif defined(__AVX2__)

constexpr int kMaxTiles = 1;

struct Lanes {
  __m256 v, w;
};

inline Lanes zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes every(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline __m256 widened(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}
inline Lanes load(const uint16_t* from) {
  const __m128i* both = reinterpret_cast<const __m128i*>(from);
  return {widened(_mm_loadu_si128(both)), widened(_mm_loadu_si128(both + 1))};
}
inline Lanes load(const int8_t* from) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(all, 8)))};
}
inline void store(float* to, Lanes a) {
  _mm256_storeu_ps(to, a.v);
  _mm256_storeu_ps(to + 8, a.w);
}
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v), _mm256_fmadd_ps(a.w, b.w, c.w)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v), _mm256_mul_ps(a.w, b.w)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v), _mm256_add_ps(a.w, b.w)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.v, b.v), _mm256_max_ps(a.w, b.w)}; }

#else

constexpr int kMaxTiles = 1;

struct Lanes {
  float v[kLanes];
};

inline Lanes every(float x) {
  Lanes all;
  for (int i = 0; i < kLanes; ++i) all.v[i] = x;
  return all;
}
inline Lanes zeros() { return every(0.0f); }
inline Lanes load(const float* from) {
  Lanes all;
  for (int i = 0; i < kLanes; ++i) all.v[i] = from[i];
  return all;
}
inline Lanes load(const uint16_t* from) {
  Lanes all;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    __builtin_memcpy(all.v + i, &bits, 4);
  }
  return all;
}
inline Lanes load(const int8_t* from) {
  Lanes all;
  for (int i = 0; i < kLanes; ++i) all.v[i] = static_cast<float>(from[i]);
  return all;
}
inline void store(float* to, Lanes a) {
  for (int i = 0; i < kLanes; ++i) to[i] = a.v[i];
}
inline Lanes madd(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < kLanes; ++i) c.v[i] = a.v[i] * b.v[i] + c.v[i];
  return c;
}
inline Lanes operator*(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] * b.v[i];
  return a;
}
inline Lanes operator+(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] + b.v[i];
  return a;
}
inline Lanes larger(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

#endif

// The lanes in a fixed order: halves onto each other, four times.
template <typename Join>
inline float folded(Lanes all, Join join) {
  float lanes[kLanes];
  store(lanes, all);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] = join(lanes[i], lanes[i + width]);
  return lanes[0];
}

}  // namespace
}  // namespace pareto
