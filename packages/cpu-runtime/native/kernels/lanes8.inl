// Vectors of 8 lanes, AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pareto {
namespace {

struct Lanes8 {
  static constexpr int kLanes = 8, kFewAccs = 8;
  using Floats = __m256;
  using Ints = __m256i;

  static Floats set(float x) { return _mm256_set1_ps(x); }
  static Floats load(const float* at) { return _mm256_loadu_ps(at); }
  static Floats load_bytes(const uint8_t* at) { return _mm256_castsi256_ps(load_ints(at)); }
  static void store(float* at, Floats x) { _mm256_storeu_ps(at, x); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats mul_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Ints load_ints(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
  static Ints set_ints(int32_t x) { return _mm256_set1_epi32(x); }
  static Ints mul_ints(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
  static Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
  // 8 values of 8 or 16 bits, widened.
  static Ints bytes(const uint8_t* at) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  }
  static Floats halves(const uint8_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static Floats bfloats(const uint8_t* at) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // The code at bit `shift` of each lane, less the middle of its range.
  template <int shift>
  static Floats nibble(Ints codes) {
    return centred(codes, shift, 0x0f, 8);
  }
  template <int shift>
  static Floats byte(Ints codes) {
    return centred(codes, shift, 0xff, 128);
  }
  static Ints low_nibbles(Ints codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(0x0f)); }
  static Ints high_nibbles(Ints codes) { return low_nibbles(_mm256_srli_epi16(codes, 4)); }

 private:
  static Floats centred(Ints codes, int shift, int32_t mask, int32_t middle) {
    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes, shift), _mm256_set1_epi32(mask));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32(middle)));
  }
};

}  // namespace
}  // namespace pareto
