// What the kernels have in common: how they walk through panels, groups and rows. Included by each kernel file and so
// compiled for its instruction set; everything is in an unnamed namespace, so that no two files share code.
//
// A kernel is a class M of static functions, over vectors of kLanes outputs. It multiplies by steps: in one step an
// accumulator takes 32 bits of each of its outputs' weights and 32 bits of a row, which are 4 inputs in int8, 2 in bf16
// or fp16, 1 in fp32. A strip is kLanes outputs of a panel; a unit is the two strips whose u4 codes share bytes.
//
//   kLanes, kSteps                  outputs of a vector; steps of a quad of inputs
//   kFewAccs                        accumulators that fit the registers beside a unit's weights
//   kRunQuads                       quads after which an accumulator is folded into fp32 (fp16 alone needs it)
//   kRowScales, kStarts             whether prepared rows carry a scale and a first sum per group
//   kDense                          whether unquantised weights are supported
//   Word, Acc, Sum, Zeros           vectors: of weights, accumulators, fp32 sums, and zero points
//   zeros<S>(at), scale<S>(w, at)   of the strip whose u8 zero points or fp16 scales are at `at`
//   unpack<S, Z>(quad, unit, zeros, words)  the words of a unit, by strip and step
//   begin<Z>(start, zeros), step(acc, word, row), fold(acc), add(total, acc, scale, row scale)
//   save(to, acc), restore(from)    32 bits per lane
//
// Few rows (the next token) are bound by memory: a panel is read once, front to back, unpacked in registers and used
// for all rows at once. Many rows (the prompt): a chunk of a panel is unpacked once into the cache, strip by strip, and
// tiles of 12 rows by one strip run over it. Both add up in the same order.
#pragma once

#include <cstring>

#include "../epilogue.inl"
#include "../kernel.h"

namespace pareto {
namespace {

constexpr int64_t kFewRows = 4;
// Rows of one pass over unpacked chunks, and the bytes of a chunk.
constexpr int64_t kPassRows = 20 * kTileRows;
constexpr int64_t kChunkBytes = 256 << 10;
// How far ahead of its stream a thread asks for memory: the hardware's own prefetching ends at 4 KiB pages.
constexpr int64_t kAhead = 8192;
constexpr int64_t kEndless = int64_t{1} << 40;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Prepared rows: words (steps, rows), then scales (groups, rows) fp32 and starts (groups, rows) int32 where M has them.
template <class M>
int64_t row_bytes(const Packed& w) {
  return w.padded_k() * M::kSteps + 4 * w.groups() * (M::kRowScales + M::kStarts);
}

template <class M>
struct Tile {
  const int32_t* words;
  const float* scales;
  const int32_t* starts;

  Tile(const Packed& w, const uint8_t* tile, int64_t rows)
      : words(reinterpret_cast<const int32_t*>(tile)),
        scales(reinterpret_cast<const float*>(tile + rows * w.padded_k() * M::kSteps)),
        starts(reinterpret_cast<const int32_t*>(scales + (M::kRowScales ? rows * w.groups() : 0))) {}

  float scale(int64_t at) const {
    if constexpr (M::kRowScales) return scales[at];
    return 1.0f;
  }
  int32_t start(int64_t at) const {
    if constexpr (M::kStarts) return starts[at];
    return 0;
  }
};

// Where strip `i` (0 or 1) of a unit is among the strips of its panel.
template <class M>
constexpr int strip_of(int unit, int i) {
  constexpr int kHalves = 16 / M::kLanes;
  return (2 * (unit / kHalves) + i) * kHalves + unit % kHalves;
}

// Where the u4 codes of a unit are within a quad.
template <class M>
constexpr int64_t unit_at(int unit) {
  constexpr int kHalves = 16 / M::kLanes;
  return 64 * (unit / kHalves) + 4 * M::kLanes * (unit % kHalves);
}

constexpr int units_at_once(int wanted, int all) {
  int units = 1;
  while (2 * units <= wanted && 2 * units <= all) units *= 2;
  return units;
}

// R rows through `P` units, from `unit` on, of one group.
template <class M, Store S, bool Z, int R, int P>
inline void few_rows_group(const Packed& w, const Tile<M>& rows, const uint8_t* header, int64_t g, int unit,
                           float* sums) {
  constexpr int64_t kQuadBytes = 32 * static_cast<int64_t>(S);
  constexpr int kSteps = M::kSteps;
  const int64_t quads = w.quads();
  const int32_t* words = rows.words + g * quads * kSteps * R;
  const uint8_t* quad = header + w.header_bytes();
  typename M::Zeros zeros[P][2] = {};
  typename M::Acc acc[R][P][2];
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < 2; ++i) {
      if constexpr (Z) zeros[p][i] = M::template zeros<S>(header + 2 * kPanel + M::kLanes * strip_of<M>(unit + p, i));
      for (int r = 0; r < R; ++r) acc[r][p][i] = M::template begin<Z>(rows.start(g * R + r), zeros[p][i]);
    }
  for (int64_t q = 0; q < quads;) {
    const int64_t stop = smaller(quads, q + M::kRunQuads);
    for (; q < stop; ++q) {
      for (int64_t line = 0; line < kQuadBytes * P * M::kLanes / 32; line += 64)
        __builtin_prefetch(quad + kAhead + line);
      for (int p = 0; p < P; ++p) {
        typename M::Word word[2][kSteps];
        M::template unpack<S, Z>(quad, unit + p, zeros[p], word);
        for (int i = 0; i < 2; ++i)
          for (int step = 0; step < kSteps; ++step)
            for (int r = 0; r < R; ++r) M::step(acc[r][p][i], word[i][step], words + step * R + r);
      }
      words += kSteps * R;
      quad += kQuadBytes;
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p)
        for (int i = 0; i < 2; ++i) M::fold(acc[r][p][i]);
  }
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < 2; ++i) {
      const int column = M::kLanes * strip_of<M>(unit + p, i);
      const typename M::Sum scale = M::template scale<S>(w, header + 2 * column);
      for (int r = 0; r < R; ++r) {
        float* at = sums + r * kPanel + column;
        M::store(at, M::add(M::load(at), acc[r][p][i], scale, rows.scale(g * R + r)));
      }
    }
}

template <class M, Store S, bool Z, int R>
void few_rows(const Packed& w, const uint8_t* tile, const uint8_t* panel, float* sums) {
  constexpr int kUnits = 32 / M::kLanes, kAtOnce = units_at_once(M::kFewAccs / (2 * R), kUnits);
  const Tile<M> rows(w, tile, R);
  std::memset(sums, 0, R * kPanel * sizeof(float));
  for (int64_t g = 0; g < w.groups(); ++g)
    for (int unit = 0; unit < kUnits; unit += kAtOnce)
      few_rows_group<M, S, Z, R, kAtOnce>(w, rows, panel + g * w.group_bytes(), g, unit, sums);
}

// What is unpacked at a time: some whole groups, or a part of one.
struct Piece {
  int64_t group, groups, quad, quads;
  bool begins, ends;
};

template <class M>
int64_t quads_per_chunk() {
  return kChunkBytes / (256 * M::kSteps);
}

template <class M>
Piece piece_at(const Packed& w, int64_t group, int64_t quad) {
  const int64_t all = w.quads(), most = quads_per_chunk<M>();
  if (all <= most) return {group, smaller(most / all, w.groups() - group), 0, all, true, true};
  const int64_t quads = smaller(most, all - quad);
  return {group, 1, quad, quads, quad == 0, quad + quads == all};
}

inline void advance(const Piece& piece, int64_t* group, int64_t* quad) {
  *quad = piece.ends ? 0 : piece.quad + piece.quads;
  *group += piece.ends ? piece.groups : 0;
}

// The scratch of a thread: 64 / kLanes strips of (steps, kLanes) words, scales and zero points per group, and of each
// row of a pass its sums and, where a group is longer than a chunk, the accumulators between chunks.
template <class M>
struct Chunk {
  uint8_t* strips;
  int64_t strip_bytes;
  float* scales;
  uint8_t* zeros;
  float* sums;
  int32_t* carried;
  int64_t bytes;

  Chunk(const Packed& w, uint8_t* scratch) {
    const Piece piece = piece_at<M>(w, 0, 0);
    const int64_t headers = piece.groups * kPanel * 4;
    const bool carries = !piece.ends;
    strips = scratch;
    strip_bytes = piece.groups * piece.quads * M::kSteps * 4 * M::kLanes;
    int64_t at = kPanel / M::kLanes * strip_bytes;
    scales = reinterpret_cast<float*>(scratch + at);
    zeros = scratch + (at += headers);
    sums = reinterpret_cast<float*>(scratch + (at += M::kStarts ? headers : 0));
    carried = reinterpret_cast<int32_t*>(scratch + (at += kPassRows * kPanel * 4));
    bytes = at + (carries ? kPassRows * kPanel * 4 : 0);
  }
};

template <class M>
int64_t scratch_bytes(const Packed& w) {
  return Chunk<M>(w, nullptr).bytes;
}

template <class M, Store S, bool Z>
void unpack_chunk(const Packed& w, const uint8_t* panel, const Piece& piece, const Chunk<M>& chunk) {
  constexpr int64_t kWordBytes = 4 * M::kLanes;
  for (int64_t g = 0; g < piece.groups; ++g) {
    const uint8_t* header = panel + (piece.group + g) * w.group_bytes();
    for (int unit = 0; unit < 32 / M::kLanes; ++unit) {
      typename M::Zeros zeros[2] = {};
      uint8_t* out[2];
      for (int i = 0; i < 2; ++i) {
        const int strip = strip_of<M>(unit, i), column = M::kLanes * strip;
        if constexpr (Z) zeros[i] = M::template zeros<S>(header + 2 * kPanel + column);
        if constexpr (Z && M::kStarts) std::memcpy(chunk.zeros + 4 * (g * kPanel + column), &zeros[i], kWordBytes);
        M::store(chunk.scales + g * kPanel + column, M::template scale<S>(w, header + 2 * column));
        out[i] = chunk.strips + strip * chunk.strip_bytes + g * piece.quads * M::kSteps * kWordBytes;
      }
      const uint8_t* quad = header + w.header_bytes() + piece.quad * w.quad_bytes();
      for (int64_t q = 0; q < piece.quads; ++q, quad += w.quad_bytes()) {
        typename M::Word word[2][M::kSteps];
        M::template unpack<S, Z>(quad, unit, zeros, word);
        for (int i = 0; i < 2; ++i) {
          std::memcpy(out[i], word[i], sizeof(word[i]));
          out[i] += sizeof(word[i]);
        }
      }
    }
  }
}

// R rows by one strip over one chunk; `sums` go on from what earlier chunks left there.
template <class M, bool Z, int R>
void strip_tile(const Packed& w, const Tile<M>& rows, const Piece& piece, const Chunk<M>& chunk, int strip, float* sums,
                int32_t* carried) {
  constexpr int kSteps = M::kSteps, kWordBytes = 4 * M::kLanes;
  const int column = strip * M::kLanes;
  const int32_t* words = rows.words + (piece.group * w.quads() + piece.quad) * kSteps * R;
  const uint8_t* weights = chunk.strips + strip * chunk.strip_bytes;
  typename M::Sum total[R];
  for (int r = 0; r < R; ++r) total[r] = M::load(sums + r * kPanel + column);
  for (int64_t g = 0; g < piece.groups; ++g) {
    const int64_t at = (piece.group + g) * R;
    typename M::Acc acc[R];
    typename M::Zeros zeros{};
    if constexpr (Z) std::memcpy(&zeros, chunk.zeros + 4 * (g * kPanel + column), sizeof(zeros));
    for (int r = 0; r < R; ++r) {
      if (piece.begins)
        acc[r] = M::template begin<Z>(rows.start(at + r), zeros);
      else
        acc[r] = M::restore(carried + r * kPanel + column);
    }
    for (int64_t q = 0; q < piece.quads;) {
      const int64_t stop = smaller(piece.quads, q + M::kRunQuads);
      for (; q < stop; ++q) {
        for (int step = 0; step < kSteps; ++step) {
          typename M::Word word;
          std::memcpy(&word, weights, sizeof(word));
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) M::step(acc[r], word, words + r);
          weights += kWordBytes;
          words += R;
        }
      }
      for (int r = 0; r < R; ++r) M::fold(acc[r]);
    }
    const typename M::Sum scale = M::load(chunk.scales + g * kPanel + column);
    for (int r = 0; r < R; ++r) {
      if (piece.ends)
        total[r] = M::add(total[r], acc[r], scale, rows.scale(at + r));
      else
        M::save(carried + r * kPanel + column, acc[r]);
    }
  }
  for (int r = 0; r < R; ++r) M::store(sums + r * kPanel + column, total[r]);
}

template <class M, Store S, bool Z>
struct Tables {
  using Few = void (*)(const Packed&, const uint8_t*, const uint8_t*, float*);
  using Strip = void (*)(const Packed&, const Tile<M>&, const Piece&, const Chunk<M>&, int, float*, int32_t*);
  static constexpr bool kZ = Z && M::kStarts;
  static constexpr Few kFew[] = {few_rows<M, S, Z, 1>, few_rows<M, S, Z, 2>, few_rows<M, S, Z, 3>,
                                 few_rows<M, S, Z, 4>};
  static constexpr Strip kStrip[] = {strip_tile<M, kZ, 1>,  strip_tile<M, kZ, 2>,  strip_tile<M, kZ, 3>,
                                     strip_tile<M, kZ, 4>,  strip_tile<M, kZ, 5>,  strip_tile<M, kZ, 6>,
                                     strip_tile<M, kZ, 7>,  strip_tile<M, kZ, 8>,  strip_tile<M, kZ, 9>,
                                     strip_tile<M, kZ, 10>, strip_tile<M, kZ, 11>, strip_tile<M, kZ, 12>};
};

// One tile of rows over one chunk, by vectors.
template <class M, Store S, bool Z>
void vector_tile(const Packed& w, const uint8_t* tile, int64_t rows, const Piece& piece, const Chunk<M>& chunk,
                 float* sums, int32_t* carried) {
  const Tile<M> prepared(w, tile, rows);
  for (int strip = 0; strip < kPanel / M::kLanes; ++strip)
    Tables<M, S, Z>::kStrip[rows - 1](w, prepared, piece, chunk, strip, sums, carried);
}

template <class M>
using RunTile = void (*)(const Packed&, const uint8_t*, int64_t, const Piece&, const Chunk<M>&, float*, int32_t*);

template <class M, Store S, bool Z, RunTile<M> run_tile>
void many_rows(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last, const Epilogue& e,
               uint8_t* scratch) {
  const Chunk<M> chunk(w, scratch);
  const int64_t bytes = row_bytes<M>(w);
  for (int64_t from = 0; from < m; from += kPassRows) {
    const int64_t pass = smaller(m - from, kPassRows);
    for (int64_t panel = first; panel < last; ++panel) {
      std::memset(chunk.sums, 0, static_cast<size_t>(pass * kPanel) * sizeof(float));
      for (int64_t group = 0, quad = 0; group < w.groups();) {
        const Piece piece = piece_at<M>(w, group, quad);
        unpack_chunk<M, S, Z>(w, w.data + panel * w.panel_bytes(), piece, chunk);
        for (int64_t row = 0; row < pass; row += kTileRows)
          run_tile(w, prepared + (from + row) * bytes, smaller(pass - row, kTileRows), piece, chunk,
                   chunk.sums + row * kPanel, chunk.carried + row * kPanel);
        advance(piece, &group, &quad);
      }
      for (int64_t row = 0; row < pass; ++row) finish(e, w.n, from + row, panel, chunk.sums + row * kPanel);
    }
  }
}

template <class M, Store S, bool Z>
void multiply_as(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last, const Epilogue& e,
                 uint8_t* scratch) {
  if (m > kFewRows) return many_rows<M, S, Z, vector_tile<M, S, Z>>(w, prepared, m, first, last, e, scratch);
  alignas(64) float sums[kFewRows * kPanel];
  for (int64_t panel = first; panel < last; ++panel) {
    Tables<M, S, Z>::kFew[m - 1](w, prepared, w.data + panel * w.panel_bytes(), sums);
    for (int64_t row = 0; row < m; ++row) finish(e, w.n, row, panel, sums + row * kPanel);
  }
}

template <class M>
void multiply(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last, const Epilogue& e,
              uint8_t* scratch) {
  if (m == 0 || first >= last) return;
  const auto as = [&](auto run) { run(w, prepared, m, first, last, e, scratch); };
  if (w.store == Store::u4)
    return w.asymmetric ? as(multiply_as<M, Store::u4, true>) : as(multiply_as<M, Store::u4, false>);
  if (w.store == Store::u8)
    return w.asymmetric ? as(multiply_as<M, Store::u8, true>) : as(multiply_as<M, Store::u8, false>);
  if constexpr (M::kDense)
    return w.store == Store::f32 ? as(multiply_as<M, Store::f32, false>) : as(multiply_as<M, Store::bf16, false>);
}

template <class M>
bool supports(const Packed& w) {
  return w.dense() ? M::kDense : !M::kStarts || w.group <= kLongestInt8Group;
}

}  // namespace
}  // namespace pareto
