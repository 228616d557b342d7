// Included by ops.inl: attention of a block of queries over chunks of the cache.
//
// Scores and weighted values are both products of a few rows with a panel of 16-wide tiles. Every result is one chain
// of multiply-adds in ascending order, so that it depends neither on the rows nor on the tiles computed beside it.
#pragma once

#include <type_traits>

#include "append.inl"
#include "attention.h"
#include "bf16_pairs.inl"
#include "epilogue.inl"
#include "lanes.inl"

namespace pareto {
namespace {

constexpr int kRows = 6;
// Above this many queries a chunk of int8 is turned into fp32 once instead of in each product.
constexpr int64_t kConvertAbove = 12;

// What an element of the cache is multiplied with, and how many terms of a sum that is.
template <typename Element>
struct Terms {
  using Factor = float;
  static constexpr int kCount = 1;
};
template <>
struct Terms<Bf16Pair> {
  using Factor = Bf16Pair;
  static constexpr int kCount = 2;
};
template <typename Element>
using Factor = typename Terms<Element>::Factor;

// sums (R, T tiles of 16) += a (count, R) times b (count, T tiles). a[k, r] lies at k * A_K + r * A_R, b's tiles b_tile
// apart, its rows b_row apart; a row of sums is sums_row long.
template <int R, int T, int A_K, int A_R, typename Element>
inline void product(const Factor<Element>* a, const Element* b, int64_t b_row, int64_t b_tile, int64_t count,
                    float* sums, int64_t sums_row) {
  Lanes total[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) total[r][t] = load(sums + r * sums_row + t * kLanes);
  for (int64_t k = 0; k < count; ++k) {
    decltype(load(b)) tiles[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) tiles[t] = load(b + t * b_tile);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto one = every(a[r * A_R]);
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
inline void product_of_tiles(const Factor<Element>* a, const Element* b, int64_t b_row, int64_t b_tile, int64_t count,
                             int64_t tiles, float* sums, int64_t sums_row) {
  int64_t t = 0;
  if constexpr (kMaxTiles >= 4) {
    for (; t + 4 <= tiles; t += 4)
      product<R, 4, A_K, A_R>(a, b + t * b_tile, b_row, b_tile, count, sums + t * kLanes, sums_row);
    for (; t + 2 <= tiles; t += 2)
      product<R, 2, A_K, A_R>(a, b + t * b_tile, b_row, b_tile, count, sums + t * kLanes, sums_row);
  }
  for (; t < tiles; ++t) product<R, 1, A_K, A_R>(a, b + t * b_tile, b_row, b_tile, count, sums + t * kLanes, sums_row);
}

template <typename Element>
constexpr int64_t key_elements(int64_t head_dim) {
  return (head_dim + Terms<Element>::kCount - 1) / Terms<Element>::kCount;
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

// Scores to exp(score - largest) within `range`; sets the state's largest and sum. Positions of the range's outer tiles
// that the row does not see hold anything before and nothing of use after.
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
  Lanes sum = zeros();
  for (int64_t i = from; i < to; i += kLanes) {
    const Lanes weights = exp_up_to_one(load(scores + i) - every(top));
    store(scores + i, weights);
    sum = sum + weights;
  }
  state[0] = top;
  state[1] = folded(sum, [](float a, float b) { return a + b; });
  if (value_scales)
    for (int64_t i = from; i < to; ++i) scores[i] *= value_scales[i];
}

// Weighted values of R rows, [low, high) of the chunk's elements for each. What all rows see is done together; what
// only some see is done row by row before and after, so that no row meets a value that is not its own to see.
template <int R, typename Element>
inline void weigh(const Factor<Element>* weights, const Element* values, int64_t width, const Range* ranges,
                  float* sums, int64_t sums_row) {
  constexpr int kElements = kChunk / Terms<Element>::kCount;
  const auto piece = [&]<int Rows>(int row, int64_t low, int64_t high) {
    if (low >= high) return;
    product_of_tiles<Rows, 1, kElements>(weights + row * kElements + low, values + low * width, width, kLanes,
                                         high - low, width / kLanes, sums + row * sums_row, sums_row);
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

// The same for pairs: of a pair at either end of its range a row may see but one value.
template <int R>
inline void weigh_pairs(const float* scores, const Bf16Pair* values, int64_t width, const Range* ranges, float* sums,
                        int64_t sums_row, uint16_t* rounded, Bf16Pair* half) {
  constexpr int kPairs = kChunk / 2;
  const auto* weights = reinterpret_cast<const Bf16Pair*>(rounded);
  const auto end = [&](int row, int64_t pair, bool is_first) {
    for (int64_t i = 0; i < width; ++i) {
      const Bf16Pair both = values[pair * width + i];
      half[i] = is_first ? Bf16Pair{both.first, 0} : Bf16Pair{0, both.second};
    }
    product_of_tiles<1, 1, kPairs>(weights + row * kPairs + pair, half, width, kLanes, 1, width / kLanes,
                                   sums + row * sums_row, sums_row);
  };
  Range whole[R];
  for (int r = 0; r < R; ++r) {
    const Range& range = ranges[r];
    for (int64_t i = r * kChunk + range.low / kLanes * kLanes; i < r * kChunk + range.high; i += kLanes)
      round_to(rounded + i, load(scores + i));
    if (range.low % 2) end(r, range.low / 2, false);
    whole[r] = {(range.low + 1) / 2, range.high / 2};
  }
  weigh<R>(weights, values, width, whole, sums, sums_row);
  for (int r = 0; r < R; ++r)
    if (ranges[r].high % 2) end(r, ranges[r].high / 2, true);
}

void join(int64_t head_dim, float* state, const float* later) {
  const int64_t floats = state_floats(head_dim);
  if (state[1] == 0.0f) {
    std::memcpy(state, later, static_cast<size_t>(floats) * 4);
    return;
  }
  const float top = state[0] > later[0] ? state[0] : later[0];
  const float before = state[0] == top ? 1.0f : exp_of(state[0] - top);
  const float after = later[0] == top ? 1.0f : exp_of(later[0] - top);
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
  float* scores;      // (kRows, kChunk)
  float* partials;    // (kRows, state_floats)
  uint16_t* rounded;  // (kRows, kChunk) for pairs: the weights
  Bf16Pair* half;     // (value_width) one pair of values of which only one is seen
};

// Queries [first, first + R) of the block over one chunk; q (elements of a key, R) is scaled.
template <int R, typename Element>
void attend_tile(const Queries& queries, const Factor<Element>* q, int64_t first, const Chunk<Element>& chunk,
                 const TileSpace& space, float* states) {
  const int64_t dim = queries.head_dim, width = value_width(dim), floats = state_floats(dim);
  const int64_t elements = key_elements<Element>(dim);
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
  product_of_tiles<R, R, 1>(q, chunk.keys + low * elements, kKeyTile, kKeyTile * elements, elements, tiles,
                            space.scores + low, kChunk);
  for (int r = 0; r < R; ++r) {
    if (ranges[r].high == 0) continue;
    const int64_t row = (first + r) / queries.group, head = (first + r) % queries.group;
    soften(space.scores + r * kChunk, ranges[r], chunk.key_scales, chunk.value_scales,
           queries.slopes ? queries.slopes[head] : 0.0f, chunk.begin - queries.first_position - row,
           space.partials + r * floats);
  }
  float* sums = space.partials + kStateHead;
  if constexpr (std::is_same_v<Element, Bf16Pair>)
    weigh_pairs<R>(space.scores, chunk.values, width, ranges, sums, floats, space.rounded, space.half);
  else
    weigh<R>(space.scores, chunk.values, width, ranges, sums, floats);
  for (int r = 0; r < R; ++r)
    if (ranges[r].high) join(dim, states + (first + r) * floats, space.partials + r * floats);
}

inline int tile_rows(int64_t left) { return left >= 6 && left != 8 ? 6 : left >= 4 ? 4 : static_cast<int>(left); }

template <typename Element>
void attend_chunk(const Queries& queries, const Factor<Element>* q, const Chunk<Element>& chunk, const TileSpace& space,
                  float* states) {
  for (int64_t first = 0; first < queries.count();) {
    const int rows = tile_rows(queries.count() - first);
    const Factor<Element>* tile = q + first * key_elements<Element>(queries.head_dim);
    switch (rows) {
      case 6:
        attend_tile<6>(queries, tile, first, chunk, space, states);
        break;
      case 4:
        attend_tile<4>(queries, tile, first, chunk, space, states);
        break;
      case 3:
        attend_tile<3>(queries, tile, first, chunk, space, states);
        break;
      case 2:
        attend_tile<2>(queries, tile, first, chunk, space, states);
        break;
      default:
        attend_tile<1>(queries, tile, first, chunk, space, states);
        break;
    }
    first += rows;
  }
}

// A query as the products take it, its elements `step` apart.
inline void factors(const float* source, int64_t dim, float scale, float* q, int64_t step) {
  for (int64_t i = 0; i < dim; ++i) q[i * step] = source[i] * scale;
}
inline void factors(const float* source, int64_t dim, float scale, Bf16Pair* q, int64_t step) {
  for (int64_t i = 0; i < dim; i += 2)
    q[i / 2 * step] = {bf16_of(source[i] * scale), i + 1 < dim ? bf16_of(source[i + 1] * scale) : uint16_t{0}};
}

// The queries by tiles, each (elements of a key, rows of the tile), times the scale.
template <typename Element>
inline void gather(const Queries& queries, Factor<Element>* q) {
  const int64_t dim = queries.head_dim;
  for (int64_t first = 0; first < queries.count();) {
    const int rows = tile_rows(queries.count() - first);
    for (int r = 0; r < rows; ++r) {
      const int64_t row = (first + r) / queries.group, head = (first + r) % queries.group;
      factors(queries.q + row * queries.row_stride + head * dim, dim, queries.scale,
              q + first * key_elements<Element>(dim) + r, rows);
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
  const int64_t elements = key_elements<Element>(dim), end = queries.first_position + queries.rows;
  float* keys = scratch;
  float* values = keys + kChunk * dim;
  TileSpace space;
  space.scores = values + kChunk * width;
  space.partials = space.scores + kRows * kChunk;
  space.rounded = reinterpret_cast<uint16_t*>(space.partials + kRows * state_floats(dim));
  space.half = reinterpret_cast<Bf16Pair*>(space.rounded + kRows * kChunk);
  auto* q = reinterpret_cast<Factor<Element>*>(space.half + width);
  gather<Element>(queries, q);
  for (int64_t i = 0; i < count; ++i) states[i * state_floats(dim) + 1] = 0.0f;
  for (int64_t number = first; number < last; ++number) {
    const int64_t begin = number * kChunk, used = end - begin < kChunk ? end - begin : kChunk;
    if (used <= 0) break;
    const Chunk<Element> chunk = {
        reinterpret_cast<const Element*>(plane.keys) + begin * elements,
        reinterpret_cast<const Element*>(plane.values) + begin / Terms<Element>::kCount * width,
        plane.key_scales ? plane.key_scales + begin : nullptr,
        plane.value_scales ? plane.value_scales + begin : nullptr, begin};
    if constexpr (std::is_same_v<Element, int8_t>) {
      if (count > kConvertAbove) {
        converted(chunk.keys, (used + kKeyTile - 1) / kKeyTile * kKeyTile * dim, keys);
        converted(chunk.values, used * width, values);
        attend_chunk(queries, q, Chunk<float>{keys, values, chunk.key_scales, chunk.value_scales, begin}, space,
                     states);
        continue;
      }
    }
    attend_chunk(queries, q, chunk, space, states);
  }
}

void attend(CacheType type, const Plane& plane, const Queries& queries, int64_t first, int64_t last, float* states,
            float* scratch) {
  switch (type) {
    case CacheType::fp32:
      return attend_as<float>(plane, queries, first, last, states, scratch);
    case CacheType::bf16:
      return attend_as<Bf16Pair>(plane, queries, first, last, states, scratch);
    case CacheType::int8:
      return attend_as<int8_t>(plane, queries, first, last, states, scratch);
  }
}

}  // namespace
}  // namespace pareto
