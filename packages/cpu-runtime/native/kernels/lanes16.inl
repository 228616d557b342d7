// Vectors of 16 lanes, AVX-512 F.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pareto {
namespace {

struct Lanes16 {
  static constexpr int kLanes = 16, kFewAccs = 16;
  using Floats = __m512;
  using Ints = __m512i;

  static Floats set(float x) { return _mm512_set1_ps(x); }
  static Floats load(const float* at) { return _mm512_loadu_ps(at); }
  static Floats load_bytes(const uint8_t* at) { return _mm512_loadu_ps(at); }
  static void store(float* at, Floats x) { _mm512_storeu_ps(at, x); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Ints load_ints(const void* at) { return _mm512_loadu_si512(at); }
  static Ints set_ints(int32_t x) { return _mm512_set1_epi32(x); }
  static Ints mul_ints(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
  static Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
  // 16 values of 8 or 16 bits, widened.
  static Ints bytes(const uint8_t* at) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static Floats halves(const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static Floats bfloats(const uint8_t* at) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // The code at bit `shift` of each lane, less the middle of its range. The look-up sees the lowest 4 bits alone.
  template <int shift>
  static Floats nibble(Ints codes) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, shift), values);
  }
  template <int shift>
  static Floats byte(Ints codes) {
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(codes, shift), _mm512_set1_epi32(0xff));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(128)));
  }
  static Ints low_nibbles(Ints codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(0x0f)); }
  static Ints high_nibbles(Ints codes) { return low_nibbles(_mm512_srli_epi16(codes, 4)); }
};

}  // namespace
}  // namespace pareto
