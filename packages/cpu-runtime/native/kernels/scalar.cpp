// fp32 compute on any x86-64: 4 lanes of SSE2, which every such processor has. Without fused multiply-add and without a
// conversion from fp16, both are done in plain arithmetic.
#include <emmintrin.h>

#include "fp32.inl"

namespace pareto {
namespace {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 0x1f, fraction = half & 0x3ff;
  if (exponent == 0) {
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Lanes4 {
  static constexpr int kLanes = 4, kFewAccs = 8;
  using Floats = __m128;
  using Ints = __m128i;

  static Floats set(float x) { return _mm_set1_ps(x); }
  static Floats load(const float* at) { return _mm_loadu_ps(at); }
  static Floats load_bytes(const uint8_t* at) { return _mm_castsi128_ps(load_ints(at)); }
  static void store(float* at, Floats x) { _mm_storeu_ps(at, x); }
  static Floats mul(Floats a, Floats b) { return _mm_mul_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm_sub_ps(a, b); }
  static Floats mul_add(Floats a, Floats b, Floats c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
  static Ints load_ints(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
  static Floats to_floats(Ints x) { return _mm_cvtepi32_ps(x); }
  static Ints bytes(const uint8_t* at) { return _mm_setr_epi32(at[0], at[1], at[2], at[3]); }
  static Floats halves(const uint8_t* at) {
    uint16_t half[4];
    std::memcpy(half, at, sizeof(half));
    return _mm_setr_ps(half_to_float(half[0]), half_to_float(half[1]), half_to_float(half[2]), half_to_float(half[3]));
  }
  static Floats bfloats(const uint8_t* at) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), bits));
  }
  template <int shift>
  static Floats nibble(Ints codes) {
    return centred(codes, shift, 0x0f, 8);
  }
  template <int shift>
  static Floats byte(Ints codes) {
    return centred(codes, shift, 0xff, 128);
  }

 private:
  static Floats centred(Ints codes, int shift, int32_t mask, int32_t middle) {
    const __m128i code = _mm_and_si128(_mm_srli_epi32(codes, shift), _mm_set1_epi32(mask));
    return _mm_cvtepi32_ps(_mm_sub_epi32(code, _mm_set1_epi32(middle)));
  }
};

using Scalar = Fp32<Lanes4>;

}  // namespace

extern const Kernel kScalar;
const Kernel kScalar = {"scalar",        "fp32",          Isa::scalar,           supports<Scalar>, row_bytes<Scalar>,
                        Scalar::prepare, scratch_bytes<Scalar>, multiply<Scalar>};

}  // namespace pareto
