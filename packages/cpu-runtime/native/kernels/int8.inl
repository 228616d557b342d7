// INT4 (and INT8) weights with int8 compute: unsigned codes by signed activations, four products per lane and step. The zero
// point is taken off by starting each group's sum at -zero * sum(activations). The sums of a group are exact.
//
// V is a set of vector operations as in lanes8.inl, with dot(acc, unsigned bytes, signed bytes).
#pragma once

#include "../int8_rows.inl"
#include "tiled.inl"

namespace pareto {
namespace {

template <class V>
struct Int8 : V {
  using Word = typename V::Ints;
  using Acc = Word;
  using Sum = typename V::Floats;
  using Zeros = Word;
  static constexpr int kSteps = 1;
  static constexpr int64_t kRunQuads = kEndless;
  static constexpr bool kRowScales = true, kStarts = true, kDense = false;
  static constexpr auto prepare = int8_prepare;

  template <Store S>
  static Zeros zeros(const uint8_t* at) {
    return V::bytes(at);
  }
  template <Store S>
  static Sum scale(const Packed&, const uint8_t* at) {
    return V::halves(at);
  }
  template <Store S, bool Z>
  static void unpack(const uint8_t* quad, int unit, const Zeros (&)[2], Word (&out)[2][1]) {
    if constexpr (S == Store::u4) {
      const Word codes = V::load_ints(quad + unit_at<Int8>(unit));
      out[0][0] = V::low_nibbles(codes);
      out[1][0] = V::high_nibbles(codes);
    } else {
      for (int i = 0; i < 2; ++i) out[i][0] = V::load_ints(quad + 4 * V::kLanes * strip_of<Int8>(unit, i));
    }
  }
  template <bool Z>
  static Acc begin(int32_t start, const Zeros& zeros) {
    if constexpr (Z) return V::mul_ints(V::set_ints(start), zeros);
    else return V::set_ints(start);
  }
  static void step(Acc& acc, const Word& word, const int32_t* row) { acc = V::dot(acc, word, V::set_ints(*row)); }
  static void fold(Acc&) {}
  static Sum add(const Sum& total, const Acc& acc, const Sum& scale, float row_scale) {
    return V::mul_add(V::to_floats(acc), V::mul(scale, V::set(row_scale)), total);
  }
  static void save(int32_t* to, const Acc& acc) { std::memcpy(to, &acc, sizeof(acc)); }
  static Acc restore(const int32_t* from) { return V::load_ints(from); }
};

}  // namespace
}  // namespace pareto
