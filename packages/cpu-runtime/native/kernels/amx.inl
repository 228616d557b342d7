// Tiles of AMX over the chunks of tiled.inl, whose strips are laid out as AMX wants its second factor: 16 outputs of 32 bits,
// one row per step. A tile multiplies up to 12 rows by 16 outputs by 16 steps.
//
// The first factor wants each row's steps side by side: a tile of rows is prepared as that many tiles of one row.
//
// M is as in tiled.inl, for 16 lanes; kInt8 says which instruction multiplies.
#pragma once

#include "tiled.inl"

namespace pareto {
namespace {

constexpr int64_t kTileSteps = 16;

// What ldtilecfg reads: the bytes of a row and the rows of each tile register.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers 0 to 3: sums of the four strips. 4 and 5: rows and weights of 16 steps; 6 and 7: of the steps that are left.
inline void configure(int64_t rows, int64_t rest) {
  TileConfig config;
  for (int i = 0; i < 4; ++i) config.row_bytes[i] = 64, config.rows[i] = static_cast<uint8_t>(rows);
  config.row_bytes[4] = 64, config.rows[4] = static_cast<uint8_t>(rows);
  config.row_bytes[5] = 64, config.rows[5] = kTileSteps;
  if (rest) {
    config.row_bytes[6] = static_cast<uint16_t>(4 * rest), config.rows[6] = static_cast<uint8_t>(rows);
    config.row_bytes[7] = 64, config.rows[7] = static_cast<uint8_t>(rest);
  }
  // The compiler does not know how much of memory the instruction reads.
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&config);
}

// The numbers of tile registers are part of the instructions, so these are macros.
#define PARETO_TILE_STRIP(sum, a, b, at)                                         \
  do {                                                                           \
    _tile_loadd(b, at, 64);                                                      \
    if constexpr (kInt8) _tile_dpbsud(sum, a, b); else _tile_dpbf16ps(sum, a, b); \
  } while (false)
#define PARETO_TILE_STRIPS(a, b, rows, row_bytes, weights, strip_bytes)   \
  do {                                                                    \
    _tile_loadd(a, rows, static_cast<size_t>(row_bytes));                 \
    PARETO_TILE_STRIP(0, a, b, weights);                                  \
    PARETO_TILE_STRIP(1, a, b, weights + strip_bytes);                    \
    PARETO_TILE_STRIP(2, a, b, weights + 2 * strip_bytes);                \
    PARETO_TILE_STRIP(3, a, b, weights + 3 * strip_bytes);                \
  } while (false)

// Sums (rows, 64) += rows by `steps` steps of the four strips at `weights`.
template <bool kInt8>
inline void multiply_tiles(const uint8_t* rows, int64_t row_bytes, const uint8_t* weights, int64_t strip_bytes,
                           int64_t steps, int32_t* sums) {
  constexpr size_t kStride = kPanel * 4;
  __asm__ volatile("" ::: "memory");
  _tile_loadd(0, sums, kStride);
  _tile_loadd(1, sums + 16, kStride);
  _tile_loadd(2, sums + 32, kStride);
  _tile_loadd(3, sums + 48, kStride);
  for (; steps >= kTileSteps; steps -= kTileSteps, rows += 4 * kTileSteps, weights += 64 * kTileSteps)
    PARETO_TILE_STRIPS(4, 5, rows, row_bytes, weights, strip_bytes);
  if (steps) PARETO_TILE_STRIPS(6, 7, rows, row_bytes, weights, strip_bytes);
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  _tile_stored(2, sums + 32, kStride);
  _tile_stored(3, sums + 48, kStride);
  __asm__ volatile("" ::: "memory");
}

// As strip_tile of tiled.inl, of all four strips.
template <class M, bool Z>
void amx_tile(const Packed& w, const uint8_t* tile, int64_t rows, const Piece& piece, const Chunk<M>& chunk, float* sums,
              int32_t* carried) {
  alignas(64) int32_t local[kTileRows * kPanel];
  int32_t* dots = piece.begins && piece.ends ? local : carried;
  const int64_t bytes = row_bytes<M>(w), steps = piece.quads * M::kSteps, all = w.quads() * M::kSteps;
  configure(rows, steps % kTileSteps);
  for (int64_t g = 0; g < piece.groups; ++g) {
    const int64_t group = piece.group + g;
    if (piece.begins) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t column = 0; column < kPanel; column += M::kLanes) {
          typename M::Zeros zeros;
          if constexpr (Z) std::memcpy(&zeros, chunk.zeros + 4 * (g * kPanel + column), sizeof(zeros));
          const Tile<M> row(w, tile + r * bytes, 1);
          M::save(dots + r * kPanel + column, M::template begin<Z>(row.start(group), zeros));
        }
    }
    multiply_tiles<M::kStarts>(tile + 4 * (group * all + piece.quad * M::kSteps), bytes, chunk.strips + g * steps * 64,
                               chunk.strip_bytes, steps, dots);
    if (!piece.ends) continue;
    for (int64_t r = 0; r < rows; ++r) {
      const Tile<M> row(w, tile + r * bytes, 1);
      for (int64_t column = 0; column < kPanel; column += M::kLanes) {
        float* at = sums + r * kPanel + column;
        const typename M::Acc acc = M::restore(dots + r * kPanel + column);
        M::store(at, M::add(M::load(at), acc, M::load(chunk.scales + g * kPanel + column), row.scale(group)));
      }
    }
  }
}

}  // namespace
}  // namespace pareto
