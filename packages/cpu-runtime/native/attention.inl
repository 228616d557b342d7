// Included by ops.inl: rotation, the cache's formats, and attention of a block of queries over chunks of the cache.
//
// Scores and weighted values are both products of a few rows with a panel of 16-wide tiles. Every result is one chain of
// multiply-adds in ascending order, so that it depends neither on the rows nor on the tiles computed beside it.
#pragma once

#include <cmath>

#include "attention.h"
#include "epilogue.inl"
#include "lanes.inl"

namespace pareto {
namespace {

constexpr int kRows = 6;
// Above this many queries a chunk is turned into fp32 once instead of in each product.
constexpr int64_t kConvertAbove = 12;

inline void turn(float& a, float& b, float cosine, float sine) {
  const float x = a, y = b;
  a = madd(-y, sine, x * cosine);
  b = madd(x, sine, y * cosine);
}

void rotate(const Rotary& rotary, int64_t position, float* x) {
  const int64_t half = rotary.dim / 2;
  const float* __restrict cosine = rotary.cos_sin + position * rotary.dim;
  const float* __restrict sine = cosine + half;
  float *__restrict first = x, *__restrict second = x + half;
  if (rotary.interleaved) {
    for (int64_t i = 0; i < half; ++i) turn(x[2 * i], x[2 * i + 1], cosine[i], sine[i]);
  } else {
    for (int64_t i = 0; i < half; ++i) turn(first[i], second[i], cosine[i], sine[i]);
  }
}

// To nearest even; a NaN stays one.
inline uint16_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
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
  const int64_t k = position / kKeyTile * kKeyTile * head_dim + position % kKeyTile;
  const int64_t v = position * value_width(head_dim);
  if (type == CacheType::fp32) {
    float* keys = reinterpret_cast<float*>(plane.keys) + k;
    for (int64_t i = 0; i < head_dim; ++i) keys[i * kKeyTile] = key[i];
    std::memcpy(reinterpret_cast<float*>(plane.values) + v, value, static_cast<size_t>(head_dim) * 4);
  } else if (type == CacheType::bf16) {
    uint16_t *keys = reinterpret_cast<uint16_t*>(plane.keys) + k, *values = reinterpret_cast<uint16_t*>(plane.values) + v;
    for (int64_t i = 0; i < head_dim; ++i) keys[i * kKeyTile] = bf16_of(key[i]);
    for (int64_t i = 0; i < head_dim; ++i) values[i] = bf16_of(value[i]);
  } else {
    plane.key_scales[position] = int8_codes(key, head_dim, reinterpret_cast<int8_t*>(plane.keys) + k, kKeyTile);
    plane.value_scales[position] = int8_codes(value, head_dim, reinterpret_cast<int8_t*>(plane.values) + v, 1);
  }
}

// sums (R, T tiles of 16) += a (count, R) times b (count, T tiles). a[k, r] lies at k * A_K + r * A_R, b's tiles b_tile
// apart, its rows b_row apart; a row of sums is C_ROW long.
template <int R, int T, int A_K, int A_R, typename Element>
inline void product(const float* a, const Element* b, int64_t b_row, int64_t b_tile, int64_t count, float* sums,
                    int64_t sums_row) {
  Lanes total[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) total[r][t] = load(sums + r * sums_row + t * kLanes);
  for (int64_t k = 0; k < count; ++k) {
    Lanes tiles[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) tiles[t] = load(b + t * b_tile);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Lanes one = every(a[r * A_R]);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) total[r][t] = madd(one, tiles[t], total[r][t]);
    }
    a += A_K;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store(sums + r * sums_row + t * kLanes, total[r][t]);
}

template <int R, int A_K, int A_R, typename Element>
inline void product_of_tiles(const float* a, const Element* b, int64_t b_row, int64_t b_tile, int64_t count, int64_t tiles,
                             float* sums, int64_t sums_row) {
  int64_t t = 0;
  if constexpr (kMaxTiles >= 4) {
    for (; t + 4 <= tiles; t += 4)
      product<R, 4, A_K, A_R>(a, b + t * b_tile, b_row, b_tile, count, sums + t * kLanes, sums_row);
    for (; t + 2 <= tiles; t += 2)
      product<R, 2, A_K, A_R>(a, b + t * b_tile, b_row, b_tile, count, sums + t * kLanes, sums_row);
  }
  for (; t < tiles; ++t)
    product<R, 1, A_K, A_R>(a, b + t * b_tile, b_row, b_tile, count, sums + t * kLanes, sums_row);
}

// The chunk as the products read it, and the piece of it that a row sees: [low, high) of its 128 positions.
template <typename Element>
struct Chunk {
  const Element* keys;
  const Element* values;
  const float* key_scales;
  const float* value_scales;
  int64_t begin;  // position of its first key
};

struct Range {
  int64_t low, high;
};

inline Range seen(const Queries& queries, int64_t row, int64_t begin) {
  const int64_t position = queries.first_position + row;
  const int64_t start = queries.window && position >= queries.window ? position - queries.window + 1 : 0;
  const int64_t low = start > begin ? start - begin : 0;
  const int64_t high = position + 1 - begin < kChunk ? position + 1 - begin : kChunk;
  return low < high ? Range{low, high} : Range{0, 0};
}

// Scores to exp(score - largest) within `range`; sets the state's largest and sum. Positions of the range's outer tiles that
// the row does not see hold anything before and nothing of use after.
inline void soften(float* scores, Range range, const float* key_scales, const float* value_scales, float slope,
                   int64_t distance, float* state) {
  const int64_t from = range.low / kLanes * kLanes, to = (range.high + kLanes - 1) / kLanes * kLanes;
  if (key_scales)
    for (int64_t i = from; i < to; ++i) scores[i] *= key_scales[i];
  if (slope != 0.0f)
    for (int64_t i = from; i < to; ++i) scores[i] = madd(slope, static_cast<float>(i + distance), scores[i]);
  for (int64_t i = from; i < range.low; ++i) scores[i] = -__builtin_inff();
  for (int64_t i = range.high; i < to; ++i) scores[i] = -__builtin_inff();
  Lanes largest = every(-__builtin_inff());
  for (int64_t i = from; i < to; i += kLanes) largest = larger(load(scores + i), largest);
  const float top = folded(largest, [](float a, float b) { return a > b ? a : b; });
  for (int64_t i = from; i < to; ++i) scores[i] = exp_of(scores[i] - top);
  for (int64_t i = from; i < range.low; ++i) scores[i] = 0.0f;
  for (int64_t i = range.high; i < to; ++i) scores[i] = 0.0f;
  Lanes sum = zeros();
  for (int64_t i = from; i < to; i += kLanes) sum = sum + load(scores + i);
  state[0] = top;
  state[1] = folded(sum, [](float a, float b) { return a + b; });
  if (value_scales)
    for (int64_t i = from; i < to; ++i) scores[i] *= value_scales[i];
}

// Weighted values of R rows. What all rows see is done together; what only some see is done row by row before and after,
// so that no row meets a value that is not its own to see.
template <int R, typename Element>
inline void weigh(const float* weights, const Element* values, int64_t width, const Range* ranges, float* sums,
                  int64_t sums_row) {
  const auto piece = [&]<int Rows>(int row, int64_t low, int64_t high) {
    if (low >= high) return;
    product_of_tiles<Rows, 1, kChunk>(weights + row * kChunk + low, values + low * width, width, kLanes, high - low,
                                      width / kLanes, sums + row * sums_row, sums_row);
  };
  int64_t low = ranges[0].low, high = ranges[0].high;
  for (int r = 1; r < R; ++r) {
    low = ranges[r].low > low ? ranges[r].low : low;
    high = ranges[r].high < high ? ranges[r].high : high;
  }
  if (R == 1 || low >= high) {
    for (int r = 0; r < R; ++r) piece.template operator()<1>(r, ranges[r].low, ranges[r].high);
    return;
  }
  for (int r = 0; r < R; ++r) piece.template operator()<1>(r, ranges[r].low, low);
  piece.template operator()<R>(0, low, high);
  for (int r = 0; r < R; ++r) piece.template operator()<1>(r, high, ranges[r].high);
}

void join(int64_t head_dim, float* state, const float* later) {
  const int64_t floats = state_floats(head_dim);
  if (state[1] == 0.0f) {
    std::memcpy(state, later, static_cast<size_t>(floats) * 4);
    return;
  }
  const float top = state[0] > later[0] ? state[0] : later[0];
  const float before = exp_of(state[0] - top), after = exp_of(later[0] - top);
  state[0] = top;
  state[1] = madd(later[1], after, state[1] * before);
  const Lanes a = every(before), b = every(after);
  for (int64_t i = kStateHead; i < floats; i += kLanes) store(state + i, madd(load(later + i), b, load(state + i) * a));
}

void conclude(int64_t head_dim, const float* state, float* y) {
  const float inverse = 1.0f / state[1];
  for (int64_t i = 0; i < head_dim; ++i) y[i] = state[kStateHead + i] * inverse;
}

// Scratch of one tile of queries.
struct TileSpace {
  float* scores;    // (kRows, kChunk)
  float* partials;  // (kRows, state_floats)
};

// Queries [first, first + R) of the block over one chunk; q (head_dim, R) is scaled.
template <int R, typename Element>
void attend_tile(const Queries& queries, const float* q, int64_t first, const Chunk<Element>& chunk, const TileSpace& space,
                 float* states) {
  const int64_t dim = queries.head_dim, width = value_width(dim), floats = state_floats(dim);
  Range ranges[R];
  int64_t low = kChunk, high = 0;
  for (int r = 0; r < R; ++r) {
    ranges[r] = seen(queries, (first + r) / queries.group, chunk.begin);
    if (ranges[r].high == 0) continue;
    low = ranges[r].low < low ? ranges[r].low : low;
    high = ranges[r].high > high ? ranges[r].high : high;
  }
  if (high == 0) return;
  low = low / kKeyTile * kKeyTile;
  const int64_t tiles = (high - low + kKeyTile - 1) / kKeyTile;
  std::memset(space.scores, 0, sizeof(float) * R * kChunk);
  std::memset(space.partials, 0, sizeof(float) * static_cast<size_t>(R * floats));
  product_of_tiles<R, R, 1>(q, chunk.keys + low * dim, kKeyTile, kKeyTile * dim, dim, tiles, space.scores + low, kChunk);
  for (int r = 0; r < R; ++r) {
    if (ranges[r].high == 0) continue;
    const int64_t row = (first + r) / queries.group, head = (first + r) % queries.group;
    soften(space.scores + r * kChunk, ranges[r], chunk.key_scales, chunk.value_scales,
           queries.slopes ? queries.slopes[head] : 0.0f, chunk.begin - queries.first_position - row,
           space.partials + r * floats);
  }
  weigh<R>(space.scores, chunk.values, width, ranges, space.partials + kStateHead, floats);
  for (int r = 0; r < R; ++r)
    if (ranges[r].high) join(dim, states + (first + r) * floats, space.partials + r * floats);
}

inline int tile_rows(int64_t left) { return left >= 6 && left != 8 ? 6 : left >= 4 ? 4 : static_cast<int>(left); }

template <typename Element>
void attend_chunk(const Queries& queries, const float* q, const Chunk<Element>& chunk, const TileSpace& space,
                  float* states) {
  for (int64_t first = 0; first < queries.count();) {
    const int rows = tile_rows(queries.count() - first);
    const float* tile = q + first * queries.head_dim;
    switch (rows) {
      case 6: attend_tile<6>(queries, tile, first, chunk, space, states); break;
      case 4: attend_tile<4>(queries, tile, first, chunk, space, states); break;
      case 3: attend_tile<3>(queries, tile, first, chunk, space, states); break;
      case 2: attend_tile<2>(queries, tile, first, chunk, space, states); break;
      default: attend_tile<1>(queries, tile, first, chunk, space, states); break;
    }
    first += rows;
  }
}

// The queries by tiles, each (head_dim, rows of the tile), times the scale.
inline void gather(const Queries& queries, float* q) {
  const int64_t dim = queries.head_dim;
  for (int64_t first = 0; first < queries.count();) {
    const int rows = tile_rows(queries.count() - first);
    for (int r = 0; r < rows; ++r) {
      const int64_t row = (first + r) / queries.group, head = (first + r) % queries.group;
      const float* source = queries.q + row * queries.row_stride + head * dim;
      for (int64_t i = 0; i < dim; ++i) q[first * dim + i * rows + r] = source[i] * queries.scale;
    }
    first += rows;
  }
}

template <typename Element>
inline void converted(const Element* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i));
}

template <typename Element>
void attend_as(const Plane& plane, const Queries& queries, int64_t first, int64_t last, float* states, float* scratch) {
  const int64_t dim = queries.head_dim, width = value_width(dim), count = queries.count();
  const int64_t end = queries.first_position + queries.rows;
  float* keys = scratch;
  float* values = keys + kChunk * dim;
  const TileSpace space = {values + kChunk * width, values + kChunk * width + kRows * kChunk};
  float* q = space.partials + kRows * state_floats(dim);
  gather(queries, q);
  for (int64_t i = 0; i < count; ++i) states[i * state_floats(dim) + 1] = 0.0f;
  for (int64_t number = first; number < last; ++number) {
    const int64_t begin = number * kChunk, used = end - begin < kChunk ? end - begin : kChunk;
    if (used <= 0) break;
    const Chunk<Element> chunk = {reinterpret_cast<const Element*>(plane.keys) + begin * dim,
                                  reinterpret_cast<const Element*>(plane.values) + begin * width,
                                  plane.key_scales ? plane.key_scales + begin : nullptr,
                                  plane.value_scales ? plane.value_scales + begin : nullptr, begin};
    if (sizeof(Element) == sizeof(float) || count <= kConvertAbove) {
      attend_chunk(queries, q, chunk, space, states);
    } else {
      converted(chunk.keys, (used + kKeyTile - 1) / kKeyTile * kKeyTile * dim, keys);
      converted(chunk.values, used * width, values);
      attend_chunk(queries, q, Chunk<float>{keys, values, chunk.key_scales, chunk.value_scales, begin}, space, states);
    }
  }
}

void attend(CacheType type, const Plane& plane, const Queries& queries, int64_t first, int64_t last, float* states,
            float* scratch) {
  switch (type) {
    case CacheType::fp32: return attend_as<float>(plane, queries, first, last, states, scratch);
    case CacheType::bf16: return attend_as<uint16_t>(plane, queries, first, last, states, scratch);
    case CacheType::int8: return attend_as<int8_t>(plane, queries, first, last, states, scratch);
  }
}

}  // namespace
}  // namespace pareto
