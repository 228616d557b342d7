// bf16 as half.inl wants it, without the instruction that multiplies.
#pragma once

#include "half.inl"

namespace pareto {
namespace {

struct Bf16Values {
  static constexpr uint16_t small_bits(uint32_t bits) { return static_cast<uint16_t>(bits >> 16); }
  // To nearest even, of a finite value.
  static uint16_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  // Of integers up to 256, exactly.
  static __m512i from_words(__m512i words) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16));
    const __m512i upper = _mm512_and_si512(_mm512_castps_si512(high), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), upper);
  }

  using Acc = __m512;
  static constexpr int64_t kRunQuads = kEndless;
  static Acc begin(__m512 sum) { return sum; }
  static void fold(Acc&) {}
  static __m512 sum(const Acc& acc) { return acc; }
};

}  // namespace
}  // namespace pareto
