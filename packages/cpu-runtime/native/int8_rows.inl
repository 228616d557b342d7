// The prologue of the kernels that compute in int8: a row of x becomes codes with one scale per group, and the sums
// that account for the weights' zero points. Included by each such kernel; see epilogue.inl for why.
//
// A tile of r rows holds, one after the other,
//   codes   (padded_k / 4, r) quads of 4 int8     x is about scale * code
//   scales  (groups, r) fp32                      the weights' multiplier included; equal within a span
//   starts  (groups, r) int32                     -sum of the group's codes, times the zero point where symmetric
#pragma once

#include <cmath>
#include <cstring>

#include "packed.h"

namespace pareto {
namespace {

// Inputs of a row that share a scale, in groups of the weights: a span of at least 128 inputs where groups are smaller
// and their number allows. Larger spans would cost accuracy, smaller ones cost a multiplication per sum and group.
inline int64_t span_groups(const Packed& w) {
  for (int64_t span = 128 / w.group; span > 1; --span)
    if (w.groups() % span == 0) return span;
  return 1;
}

inline int64_t int8_row_bytes(const Packed& w) { return w.padded_k() + w.groups() * 8; }

struct Int8Tile {
  const int8_t* codes;
  const float* scales;
  const int32_t* starts;

  Int8Tile(const Packed& w, const uint8_t* tile, int64_t rows)
      : codes(reinterpret_cast<const int8_t*>(tile)),
        scales(reinterpret_cast<const float*>(tile + rows * w.padded_k())),
        starts(reinterpret_cast<const int32_t*>(tile + rows * (w.padded_k() + 4 * w.groups()))) {}
};

// The bits of the largest |x|; those of infinity and NaN are above all others, so neither is overlooked.
inline int32_t largest_bits(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Symmetric, 127 levels to each side, rounded to nearest even. A span that holds infinity or NaN gets the scale NaN, so
// that what is computed from it is NaN too.
inline void int8_prepare(const Packed& w, const float* x, int64_t row, int64_t rows, uint8_t* tile) {
  const int64_t padded = w.quads() * kQuad, groups = w.groups(), span = span_groups(w);
  uint8_t* codes = tile;
  float* scales = reinterpret_cast<float*>(tile + rows * w.padded_k());
  int32_t* starts = reinterpret_cast<int32_t*>(tile + rows * (w.padded_k() + 4 * groups));
  const int32_t zero = w.asymmetric ? 1 : w.middle();
  constexpr int64_t kPiece = 256;  // codes on their way to their places
  alignas(64) int8_t piece[kPiece];
  float scale = 0.0f, raise = 1.0f, inverse = 0.0f;
  bool finite = true;
  for (int64_t g = 0; g < groups; ++g) {
    const float* source = x + g * w.group;
    if (g % span == 0) {
      const int32_t bits = largest_bits(source, span * w.group);
      float largest;
      std::memcpy(&largest, &bits, 4);
      finite = bits < 0x7f800000;
      // Where 127 / largest would overflow, x is first raised by a power of two.
      raise = largest < 0x1p-100f ? 0x1p80f : 1.0f;
      inverse = bits == 0 || !finite ? 0.0f : 127.0f / (largest * raise);
      scale = finite ? largest / 127.0f * w.multiplier : std::nanf("");
    }
    int32_t total = 0;
    for (int64_t from = 0; from < padded; from += kPiece) {
      const int64_t real = w.group - from < kPiece ? w.group - from : kPiece;
      const int64_t size = padded - from < kPiece ? padded - from : kPiece;
      if (!finite || real < size) std::memset(piece, 0, sizeof(piece));
      if (finite) {
        for (int64_t i = 0; i < real; ++i) {
          const int32_t code = static_cast<int32_t>(std::nearbyint(source[from + i] * raise * inverse));
          piece[i] = static_cast<int8_t>(code);
          total += code;
        }
      }
      uint8_t* place = codes + ((g * padded + from) * rows + row * kQuad);
      if (rows == 1) {
        std::memcpy(place, piece, static_cast<size_t>(size));
      } else {
        for (int64_t i = 0; i < size; i += kQuad) std::memcpy(place + i * rows, piece + i, kQuad);
      }
    }
    scales[g * rows + row] = scale;
    starts[g * rows + row] = -zero * total;
  }
}

}  // namespace
}  // namespace pareto
