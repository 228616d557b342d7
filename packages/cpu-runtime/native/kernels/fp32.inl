// INT4 (and INT8) weights with fp32 compute, and unquantised weights: table 3.1, rows "FP32 FP32 FP32". Within a group the
// codes less their zero point, which are small integers, are multiplied and added by fp32; the group's sum is then scaled.
//
// V is a set of vector operations of one instruction set: kLanes, kFewAccs, Floats, Ints and the functions used below.
#pragma once

#include "tiled.inl"

namespace pareto {
namespace {

template <class V>
struct Fp32 : V {
  using Word = typename V::Floats;
  using Acc = Word;
  using Sum = Word;
  using Zeros = Word;
  static constexpr int kSteps = 4;
  static constexpr int64_t kRunQuads = kEndless;
  static constexpr bool kRowScales = false, kStarts = false, kDense = true;

  // Zero points and codes are both taken relative to the middle of their range; their difference is exact.
  template <Store S>
  static Zeros zeros(const uint8_t* at) {
    return V::sub(V::to_floats(V::bytes(at)), V::set(S == Store::u4 ? 8.0f : 128.0f));
  }
  template <Store S>
  static Sum scale(const Packed& w, const uint8_t* at) {
    if constexpr (is_dense(S)) return V::set(1.0f);
    else return V::mul(V::halves(at), V::set(w.multiplier));
  }
  template <Store S, bool Z>
  static void unpack(const uint8_t* quad, int unit, const Zeros (&zeros)[2], Word (&out)[2][4]) {
    if constexpr (S == Store::u4) {
      const typename V::Ints codes = V::load_ints(quad + unit_at<Fp32>(unit));
      nibbles<0>(codes, out);
      nibbles<1>(codes, out);
      nibbles<2>(codes, out);
      nibbles<3>(codes, out);
    } else if constexpr (S == Store::u8) {
      for (int i = 0; i < 2; ++i) {
        const typename V::Ints codes = V::load_ints(quad + 4 * V::kLanes * strip_of<Fp32>(unit, i));
        out[i][0] = V::template byte<0>(codes);
        out[i][1] = V::template byte<8>(codes);
        out[i][2] = V::template byte<16>(codes);
        out[i][3] = V::template byte<24>(codes);
      }
    } else {
      for (int i = 0; i < 2; ++i)
        for (int input = 0; input < 4; ++input) {
          const int64_t at = input * kPanel + V::kLanes * strip_of<Fp32>(unit, i);
          if constexpr (S == Store::f32) out[i][input] = V::load_bytes(quad + 4 * at);
          else out[i][input] = V::bfloats(quad + 2 * at);
        }
    }
    if constexpr (Z)
      for (int i = 0; i < 2; ++i)
        for (int input = 0; input < 4; ++input) out[i][input] = V::sub(out[i][input], zeros[i]);
  }
  template <bool Z>
  static Acc begin(int32_t, const Zeros&) {
    return V::set(0.0f);
  }
  static void step(Acc& acc, const Word& word, const int32_t* row) {
    float x;
    std::memcpy(&x, row, 4);
    acc = V::mul_add(word, V::set(x), acc);
  }
  static void fold(Acc&) {}
  static Sum add(const Sum& total, const Acc& acc, const Sum& scale, float) { return V::mul_add(scale, acc, total); }
  static void save(int32_t* to, const Acc& acc) { std::memcpy(to, &acc, sizeof(acc)); }
  static Acc restore(const int32_t* from) {
    Acc acc;
    std::memcpy(&acc, from, sizeof(acc));
    return acc;
  }

  // The row as it is, every group filled up with zeros to whole quads.
  static void prepare(const Packed& w, const float* x, int64_t row, int64_t rows, uint8_t* tile) {
    const int64_t padded = w.quads() * kQuad;
    float* out = reinterpret_cast<float*>(tile) + row;
    for (int64_t g = 0; g < w.groups(); ++g)
      for (int64_t i = 0; i < padded; ++i, out += rows) *out = i < w.group ? x[g * w.group + i] : 0.0f;
  }

 private:
  template <int input>
  static void nibbles(const typename V::Ints& codes, Word (&out)[2][4]) {
    out[0][input] = V::template nibble<8 * input>(codes);
    out[1][input] = V::template nibble<8 * input + 4>(codes);
  }
};

}  // namespace
}  // namespace pareto
