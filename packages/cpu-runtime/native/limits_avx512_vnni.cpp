#include <immintrin.h>

#include "limits.h"

namespace pareto {
namespace {

constexpr int64_t kAhead = 8192;
constexpr int kSums = 12;

int64_t read_lines(const uint8_t* data, int64_t bytes) {
  __m512i sums[4] = {};
  for (int64_t at = 0; at + 256 <= bytes; at += 256)
    for (int i = 0; i < 4; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(data + at + 64 * i + kAhead), _MM_HINT_T0);
      sums[i] = _mm512_xor_si512(sums[i], _mm512_loadu_si512(data + at + 64 * i));
    }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3]));
  return _mm512_reduce_add_epi64(all);
}

int64_t multiply_rounds(int64_t rounds) {
  __m512i sums[kSums], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < rounds; ++i) {
    // The operands are opaque to the compiler, so that no round can be left out.
    __asm__ volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) sums[s] = _mm512_dpbusd_epi32(sums[s], a, b);
  }
  __m512i all = sums[0];
  for (int s = 1; s < kSums; ++s) all = _mm512_add_epi32(all, sums[s]);
  return _mm512_reduce_add_epi32(all);
}

}  // namespace

extern const Limits kAvx512VnniLimits;
const Limits kAvx512VnniLimits = {read_lines, multiply_rounds, kSums * 64};

}  // namespace pareto
