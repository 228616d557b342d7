// Sixteen floats beside each other, for each instruction set: one register with AVX-512, two with AVX2, four without.
// Multiply-add rounds once where the processor can, so results differ between instruction sets, never within one.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "epilogue.inl"

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
inline Lanes load(const int8_t* from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
}
inline void store(float* to, Lanes a) { _mm512_storeu_ps(to, a.v); }
inline Lanes madd(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
// The second where either is NaN.
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes nearest(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// p * 2^n, or 0 where x < -87.
inline Lanes raised(Lanes p, Lanes n, Lanes x) {
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ), p.v, n.v)};
}

#elif defined(__AVX2__)

constexpr int kMaxTiles = 1;

struct Lanes {
  __m256 v, w;
};

inline Lanes zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes every(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Lanes load(const int8_t* from) {
  const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(all, 8)))};
}
inline void store(float* to, Lanes a) {
  _mm256_storeu_ps(to, a.v);
  _mm256_storeu_ps(to + 8, a.w);
}
inline Lanes madd(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v), _mm256_fmadd_ps(a.w, b.w, c.w)};
}
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v), _mm256_mul_ps(a.w, b.w)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v), _mm256_add_ps(a.w, b.w)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.v, b.v), _mm256_sub_ps(a.w, b.w)}; }
// The second where either is NaN.
inline Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.v, b.v), _mm256_max_ps(a.w, b.w)}; }
inline Lanes nearest(Lanes a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.v, kMode), _mm256_round_ps(a.w, kMode)};
}
inline __m256 raised(__m256 p, __m256 n, __m256 x) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const __m256 power = _mm256_mul_ps(p, _mm256_castsi256_ps(bits));
  return _mm256_and_ps(power, _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_NLT_UQ));
}
// p * 2^n, or 0 where x < -87.
inline Lanes raised(Lanes p, Lanes n, Lanes x) { return {raised(p.v, n.v, x.v), raised(p.w, n.w, x.w)}; }

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
inline Lanes operator-(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] - b.v[i];
  return a;
}
// The second where either is NaN.
inline Lanes larger(Lanes a, Lanes b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

#endif

// exp(x) for x up to 0; 0 below -87, so also for -infinity. A NaN stays one. The polynomial is exp_of's.
#if defined(__AVX2__)
inline Lanes exp_up_to_one(Lanes x) {
  const Lanes n = nearest(x * every(1.44269504088896341f));
  const Lanes r = madd(n, every(-1.42860682030941723e-6f), madd(n, every(-0.693145751953125f), x));
  Lanes p = madd(every(1.9875691500e-4f), r, every(1.3981999507e-3f));
  p = madd(p, r, every(8.3334519073e-3f));
  p = madd(p, r, every(4.1665795894e-2f));
  p = madd(p, r, every(1.6666665459e-1f));
  p = madd(p, r, every(5.0000001201e-1f));
  return raised(madd(p, r * r, r) + every(1.0f), n, x);
}
#else
inline Lanes exp_up_to_one(Lanes x) {
  for (int i = 0; i < kLanes; ++i) x.v[i] = x.v[i] < -87.0f ? 0.0f : exp_of(x.v[i]);
  return x;
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
