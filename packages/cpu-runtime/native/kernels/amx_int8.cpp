// int8 compute on AMX_INT8. Tiles of up to four rows (the next token) go through vpdpbusd, which every processor with AMX
// has: int8 sums are exact, so a row's result is the same by either.
#include <immintrin.h>

#include "amx.inl"
#include "int8.inl"
#include "lanes16.inl"

namespace pareto {
namespace {

struct Vnni16 : Lanes16 {
  static Ints dot(Ints acc, Ints codes, Ints row) { return _mm512_dpbusd_epi32(acc, codes, row); }
};

using Maths = Int8<Vnni16>;

void prepare(const Packed& w, const float* x, int64_t row, int64_t rows, uint8_t* tile) {
  if (rows <= kFewRows) int8_prepare(w, x, row, rows, tile);
  else int8_prepare(w, x, 0, 1, tile + row * int8_row_bytes(w));
}

template <Store S, bool Z>
void tile_rows(const Packed& w, const uint8_t* tile, int64_t rows, const Piece& piece, const Chunk<Maths>& chunk, float* sums,
               int32_t* carried) {
  if (rows <= kFewRows) vector_tile<Maths, S, Z>(w, tile, rows, piece, chunk, sums, carried);
  else amx_tile<Maths, Z>(w, tile, rows, piece, chunk, sums, carried);
}

template <Store S, bool Z>
void run(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last, const Epilogue& e,
         uint8_t* scratch) {
  if (m <= kFewRows) return multiply_as<Maths, S, Z>(w, prepared, m, first, last, e, scratch);
  many_rows<Maths, S, Z, tile_rows<S, Z>>(w, prepared, m, first, last, e, scratch);
  _tile_release();
}

void multiply_on_tiles(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last,
                       const Epilogue& e, uint8_t* scratch) {
  if (m == 0 || first >= last) return;
  const auto as = [&](auto multiply) { multiply(w, prepared, m, first, last, e, scratch); };
  if (w.store == Store::u8) return w.asymmetric ? as(run<Store::u8, true>) : as(run<Store::u8, false>);
  return w.asymmetric ? as(run<Store::u4, true>) : as(run<Store::u4, false>);
}

bool supports_here(const Packed& w) { return supports<Maths>(w) && available(Isa::avx512_vnni); }

}  // namespace

extern const Kernel kAmxInt8;
const Kernel kAmxInt8 = {"amx_int8", "int8",              Isa::amx_int8,   supports_here, int8_row_bytes,
                         prepare,    scratch_bytes<Maths>, multiply_on_tiles};

}  // namespace pareto
