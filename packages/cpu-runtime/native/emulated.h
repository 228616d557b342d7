// Instructions that few processors have, by instructions that more have: a test build (PARETO_EMULATE) reads this file before
// the kernels of AVX_VNNI, AVX512_FP16 and AMX, and so runs their logic on a processor with AVX512_VNNI and AVX512_BF16.
// What it cannot show is that the processor does what its manual says.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace pareto {
namespace {
namespace emulated {

inline __m256i dpbusd(__m256i acc, __m256i a, __m256i b) {
  return _mm512_castsi512_si256(
      _mm512_dpbusd_epi32(_mm512_castsi256_si512(acc), _mm512_castsi256_si512(a), _mm512_castsi256_si512(b)));
}

// 32 fp16 values as their bits. A product of two and its sum with a third are rounded once to fp32 and once to fp16, where
// the instruction rounds once.
inline __m512 even_halves(__m512i x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
inline __m512 odd_halves(__m512i x) { return even_halves(_mm512_srli_epi32(x, 16)); }
inline __m512i join_halves(__m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(even, _MM_FROUND_TO_NEAREST_INT));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(odd, _MM_FROUND_TO_NEAREST_INT));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
inline __m512i fmadd_ph(__m512i a, __m512i b, __m512i c) {
  return join_halves(_mm512_fmadd_ps(even_halves(a), even_halves(b), even_halves(c)),
                     _mm512_fmadd_ps(odd_halves(a), odd_halves(b), odd_halves(c)));
}
inline __m512i cvtepi16_ph(__m512i x) {
  const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(x, 16), 16), high = _mm512_srai_epi32(x, 16);
  return join_halves(_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high));
}

// The tile registers of a thread. A use that the processor would refuse ends the process.
struct Tiles {
  uint8_t config[64];
  uint8_t bytes[8][16][64];
  bool configured;
};
inline Tiles& tiles() {
  static thread_local Tiles all;
  return all;
}
inline void require(bool held) {
  if (!held) std::abort();
}
inline int rows(int tile) { return tiles().config[48 + tile]; }
inline int row_bytes(int tile) { return tiles().config[16 + 2 * tile] | tiles().config[17 + 2 * tile] << 8; }

inline void load_config(const void* config) {
  std::memcpy(tiles().config, config, 64);
  require(tiles().config[0] == 1);
  for (int i = 0; i < 8; ++i) require(rows(i) <= 16 && row_bytes(i) <= 64 && (rows(i) == 0) == (row_bytes(i) == 0));
  std::memset(tiles().bytes, 0, sizeof(tiles().bytes));
  tiles().configured = true;
}
inline void release() { tiles().configured = false; }
inline void load(int tile, const void* base, size_t stride) {
  require(tiles().configured && rows(tile) > 0);
  for (int r = 0; r < rows(tile); ++r)
    std::memcpy(tiles().bytes[tile][r], static_cast<const uint8_t*>(base) + static_cast<size_t>(r) * stride,
                static_cast<size_t>(row_bytes(tile)));
}
inline void store(int tile, void* base, size_t stride) {
  require(tiles().configured && rows(tile) > 0);
  for (int r = 0; r < rows(tile); ++r)
    std::memcpy(static_cast<uint8_t*>(base) + static_cast<size_t>(r) * stride, tiles().bytes[tile][r],
                static_cast<size_t>(row_bytes(tile)));
}

// sums (rows, 16) += one product per row, output and step, by dot(acc, row's 32 bits, weights).
template <typename Dot>
inline void multiply(int sum, int a, int b, Dot dot) {
  require(tiles().configured && rows(sum) == rows(a) && row_bytes(a) == 4 * rows(b) && row_bytes(sum) == row_bytes(b));
  for (int r = 0; r < rows(a); ++r) {
    __m512i acc = _mm512_loadu_si512(tiles().bytes[sum][r]);
    for (int step = 0; step < rows(b); ++step) {
      int32_t word;
      std::memcpy(&word, tiles().bytes[a][r] + 4 * step, 4);
      acc = dot(acc, _mm512_set1_epi32(word), _mm512_loadu_si512(tiles().bytes[b][step]));
    }
    _mm512_storeu_si512(tiles().bytes[sum][r], acc);
  }
}
inline void dpbsud(int sum, int a, int b) {
  multiply(sum, a, b, [](__m512i acc, __m512i row, __m512i codes) { return _mm512_dpbusd_epi32(acc, codes, row); });
}
inline void dpbf16ps(int sum, int a, int b) {
  multiply(sum, a, b, [](__m512i acc, __m512i row, __m512i values) {
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(acc), __builtin_bit_cast(__m512bh, row),
                                                __builtin_bit_cast(__m512bh, values)));
  });
}

}  // namespace emulated
}  // namespace
}  // namespace pareto

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _mm256_dpbusd_avx_epi32 pareto::emulated::dpbusd
#define _mm512_castsi512_ph(x) (x)
#define _mm512_castph_si512(x) (x)
#define _mm512_fmadd_ph pareto::emulated::fmadd_ph
#define _mm512_cvtepi16_ph pareto::emulated::cvtepi16_ph
#define __m512h __m512i
#define _tile_loadconfig pareto::emulated::load_config
#define _tile_release pareto::emulated::release
#define _tile_loadd pareto::emulated::load
#define _tile_stored pareto::emulated::store
#define _tile_dpbsud pareto::emulated::dpbsud
#define _tile_dpbf16ps pareto::emulated::dpbf16ps
