// Included by ops.inl: what a row's keys go through before they are seen, rotation and the formats of the cache.
#pragma once

#include <cmath>
#include <cstring>

#include "attention.h"
#include "bf16_pairs.inl"
#include "lanes.inl"

namespace pareto {
namespace {

inline void turn(float& a, float& b, float cosine, float sine) {
  const float x = a, y = b;
  a = madd(-y, sine, x * cosine);
  b = madd(x, sine, y * cosine);
}

void rotate(const Rotary& rotary, int64_t position, float* x) {
  const int64_t half = rotary.dim / 2;
  const float* __restrict cosine = rotary.cos_sin + position * rotary.dim;
  const float* __restrict sine = cosine + half;
  float* __restrict first = x;
  float* __restrict second = x + half;
  if (rotary.interleaved) {
    for (int64_t i = 0; i < half; ++i) turn(x[2 * i], x[2 * i + 1], cosine[i], sine[i]);
  } else {
    for (int64_t i = 0; i < half; ++i) turn(first[i], second[i], cosine[i], sine[i]);
  }
}

// 127 levels to each side; the scale of a vector with infinity or NaN is NaN.
inline float int8_codes(const float* x, int64_t count, int8_t* codes, int64_t stride) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(x[i]);
    finite = finite && size <= 3.4028234663852886e38f;
    largest = size > largest ? size : largest;
  }
  // Below this 127 / largest would overflow: such values are stored as zero.
  const float inverse = finite && largest > 1e-36f ? 127.0f / largest : 0.0f;
  for (int64_t i = 0; i < count; ++i)
    codes[i * stride] = inverse == 0.0f ? int8_t{0} : static_cast<int8_t>(std::nearbyint(x[i] * inverse));
  return finite ? largest / 127.0f : __builtin_nanf("");
}

void append(CacheType type, const Plane& plane, int64_t head_dim, int64_t position, const float* key,
            const float* value) {
  const int64_t tile = position / kKeyTile * kKeyTile * key_width(type, head_dim), lane = position % kKeyTile;
  const int64_t k = tile + lane, v = position * value_width(head_dim);
  if (type == CacheType::fp32) {
    float* keys = reinterpret_cast<float*>(plane.keys) + k;
    for (int64_t i = 0; i < head_dim; ++i) keys[i * kKeyTile] = key[i];
    std::memcpy(reinterpret_cast<float*>(plane.values) + v, value, static_cast<size_t>(head_dim) * 4);
  } else if (type == CacheType::bf16) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(plane.keys) + tile + 2 * lane;
    uint16_t* values =
        reinterpret_cast<uint16_t*>(plane.values) + position / 2 * 2 * value_width(head_dim) + position % 2;
    for (int64_t i = 0; i < head_dim; ++i) keys[i / 2 * 2 * kKeyTile + i % 2] = bf16_of(key[i]);
    for (int64_t i = 0; i < head_dim; ++i) values[2 * i] = bf16_of(value[i]);
  } else {
    plane.key_scales[position] = int8_codes(key, head_dim, reinterpret_cast<int8_t*>(plane.keys) + k, kKeyTile);
    plane.value_scales[position] = int8_codes(value, head_dim, reinterpret_cast<int8_t*>(plane.values) + v, 1);
  }
}

}  // namespace
}  // namespace pareto
