// INT4 (and INT8) weights with compute in a 16-bit float: codes less their zero point are exact in both bf16 and fp16, rows are
// rounded to it, products of a group are added up, and the group's sum is scaled in fp32.
//
// T is the type: bits_of(float) of rows, from_words(vector of int16), Acc with begin, step and fold, and kRunQuads.
#pragma once

#include "../int8_rows.inl"
#include "lanes16.inl"
#include "tiled.inl"

namespace pareto {
namespace {

// The 16-bit values of the integers from -16 to 15, by a type's bits of a small float.
template <class T>
struct SmallIntegers {
  alignas(64) uint16_t bits[32];

  constexpr explicit SmallIntegers(bool nibbles) : bits{} {
    for (int i = 0; i < 32; ++i)
      bits[i] = T::small_bits(__builtin_bit_cast(uint32_t, static_cast<float>(nibbles ? i % 16 - 8 : i - 16)));
  }
};

template <class T>
struct Half : Lanes16 {
  using Word = __m512i;
  using Acc = typename T::Acc;
  using Sum = __m512;
  using Zeros = __m512i;
  static constexpr int kSteps = 2;
  static constexpr int64_t kRunQuads = T::kRunQuads;
  static constexpr bool kRowScales = true, kStarts = false, kDense = false;

  // In both halves of each lane.
  template <Store S>
  static Zeros zeros(const uint8_t* at) {
    const __m512i zero = bytes(at);
    return _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16));
  }
  template <Store S>
  static Sum scale(const Packed&, const uint8_t* at) {
    return halves(at);
  }
  template <Store S, bool Z>
  static void unpack(const uint8_t* quad, int unit, const Zeros (&zeros)[2], Word (&out)[2][2]) {
    if constexpr (S == Store::u4) {
      const __m512i codes = _mm512_loadu_si512(quad + 64 * unit);
      for (int step = 0; step < 2; ++step) {
        const __m512i words = pair(codes, step);
        out[0][step] = small<Z>(words, zeros[0]);
        out[1][step] = small<Z>(_mm512_srli_epi16(words, 4), zeros[1]);
      }
    } else {
      for (int i = 0; i < 2; ++i) {
        const __m512i codes = _mm512_loadu_si512(quad + 64 * strip_of<Half>(unit, i));
        const __m512i zero = Z ? zeros[i] : _mm512_set1_epi16(128);
        for (int step = 0; step < 2; ++step) out[i][step] = T::from_words(_mm512_sub_epi16(pair(codes, step), zero));
      }
    }
  }
  template <bool Z>
  static Acc begin(int32_t, const Zeros&) {
    return T::begin(_mm512_setzero_ps());
  }
  static void step(Acc& acc, const Word& word, const int32_t* row) { T::step(acc, word, _mm512_set1_epi32(*row)); }
  static void fold(Acc& acc) { T::fold(acc); }
  static Sum add(const Sum& total, const Acc& acc, const Sum& scale, float row_scale) {
    return _mm512_fmadd_ps(T::sum(acc), _mm512_mul_ps(scale, _mm512_set1_ps(row_scale)), total);
  }
  static void save(int32_t* to, const Acc& acc) { _mm512_storeu_ps(to, T::sum(acc)); }
  static Acc restore(const int32_t* from) { return T::begin(_mm512_loadu_ps(from)); }

  // Each group is raised or lowered by a power of two until its largest value lies in [1, 2), so that neither products
  // overflow nor small values vanish; its scale undoes that. A group with infinity or NaN gets the scale NaN.
  static void prepare(const Packed& w, const float* x, int64_t row, int64_t rows, uint8_t* tile) {
    const int64_t padded = w.quads() * kQuad;
    uint16_t* words = reinterpret_cast<uint16_t*>(tile) + 2 * row;
    float* scales = reinterpret_cast<float*>(tile + rows * w.padded_k() * kSteps);
    for (int64_t g = 0; g < w.groups(); ++g) {
      const float* source = x + g * w.group;
      const int32_t bits = largest_bits(source, w.group);
      const bool finite = bits < 0x7f800000;
      // Subnormal values are first raised by 2^64.
      const float lift = bits < 0x00800000 ? 0x1p64f : 1.0f;
      float largest;
      std::memcpy(&largest, &bits, 4);
      largest *= lift;
      int32_t exponent;
      std::memcpy(&exponent, &largest, 4);
      exponent = (exponent >> 23) - 127;
      if (bits == 0 || !finite) exponent = 0;
      const float lower = power_of_two(-exponent / 2), lower_more = power_of_two(-exponent - -exponent / 2);
      for (int64_t i = 0; i < padded; ++i, words += i % 2 ? 1 : 2 * rows - 1)
        *words = finite && i < w.group ? T::bits_of(source[i] * lift * lower * lower_more) : 0;
      const float scale = power_of_two(exponent / 2) * power_of_two(exponent - exponent / 2) / lift * w.multiplier;
      scales[g * rows + row] = finite ? scale : __builtin_nanf("");
    }
  }

 private:
  static float power_of_two(int32_t exponent) {
    const int32_t bits = (exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return power;
  }
  // Inputs 2 * step and 2 * step + 1 of the quad in each lane, as two 16-bit words.
  static __m512i pair(__m512i codes, int step) {
    const __m512i first = _mm512_set4_epi32(static_cast<int>(0x800d800c), static_cast<int>(0x80098008),
                                            static_cast<int>(0x80058004), static_cast<int>(0x80018000));
    const __m512i second = _mm512_set4_epi32(static_cast<int>(0x800f800e), static_cast<int>(0x800b800a),
                                             static_cast<int>(0x80078006), static_cast<int>(0x80038002));
    return _mm512_shuffle_epi8(codes, step ? second : first);
  }
  // The lowest 4 bits of each word less 8 or their zero point. The look-up sees the lowest 5 bits alone.
  template <bool Z>
  static __m512i small(__m512i words, __m512i zeros) {
    static constexpr SmallIntegers<T> kTable(!Z);
    const __m512i table = _mm512_load_si512(kTable.bits);
    if constexpr (!Z) return _mm512_permutexvar_epi16(words, table);
    const __m512i code = _mm512_and_si512(words, _mm512_set1_epi16(15));
    return _mm512_permutexvar_epi16(_mm512_add_epi16(_mm512_sub_epi16(code, zeros), _mm512_set1_epi16(16)), table);
  }
};

}  // namespace
}  // namespace pareto
