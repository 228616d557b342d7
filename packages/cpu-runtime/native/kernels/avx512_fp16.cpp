// fp16 compute on AVX512_FP16: table 3.1, row "FP32 FP32 FP16". Each lane holds two fp16 sums, of the inputs with even and with
// odd numbers, of 16 products each; then both go into fp32.
#include "half.inl"

namespace pareto {
namespace {

struct Fp16 {
  static constexpr uint16_t small_bits(uint32_t bits) {
    if (bits << 1 == 0) return 0;
    return static_cast<uint16_t>(((bits >> 16) & 0x8000) | (((bits >> 13) - (112 << 10)) & 0x7fff));
  }
  static uint16_t bits_of(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
  static __m512i from_words(__m512i words) { return _mm512_castph_si512(_mm512_cvtepi16_ph(words)); }

  struct Acc {
    __m512i pair;
    __m512 sum;
  };
  static constexpr int64_t kRunQuads = 8;
  static Acc begin(__m512 sum) { return {_mm512_setzero_si512(), sum}; }
  static void step(Acc& acc, __m512i word, __m512i row) {
    const __m512h pair = _mm512_castsi512_ph(acc.pair);
    acc.pair = _mm512_castph_si512(_mm512_fmadd_ph(_mm512_castsi512_ph(word), _mm512_castsi512_ph(row), pair));
  }
  static void fold(Acc& acc) {
    const __m512 even = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(acc.pair));
    const __m512 odd = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(acc.pair, 16)));
    acc.sum = _mm512_add_ps(acc.sum, _mm512_add_ps(even, odd));
    acc.pair = _mm512_setzero_si512();
  }
  static __m512 sum(const Acc& acc) { return acc.sum; }
};

using Maths = Half<Fp16>;

}  // namespace

extern const Kernel kAvx512Fp16;
const Kernel kAvx512Fp16 = {"avx512_fp16",  "fp16",          Isa::avx512_fp16,     supports<Maths>, row_bytes<Maths>,
                            Maths::prepare, scratch_bytes<Maths>, multiply<Maths>};

}  // namespace pareto
