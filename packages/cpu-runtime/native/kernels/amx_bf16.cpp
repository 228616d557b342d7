// bf16 compute on AMX_BF16. All rows go through tiles: AVX512_BF16 adds up in another order, and a row's result must not depend
// on the rows beside it.
#include <immintrin.h>

#include "amx.inl"
#include "bf16.inl"

namespace pareto {
namespace {

using Maths = Half<Bf16Values>;

void prepare(const Packed& w, const float* x, int64_t row, int64_t, uint8_t* tile) {
  Maths::prepare(w, x, 0, 1, tile + row * row_bytes<Maths>(w));
}

template <Store S, bool Z>
void run(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last, const Epilogue& e,
         uint8_t* scratch) {
  many_rows<Maths, S, Z, amx_tile<Maths, false>>(w, prepared, m, first, last, e, scratch);
  _tile_release();
}

void multiply_on_tiles(const Packed& w, const uint8_t* prepared, int64_t m, int64_t first, int64_t last,
                       const Epilogue& e, uint8_t* scratch) {
  if (m == 0 || first >= last) return;
  const auto as = [&](auto multiply) { multiply(w, prepared, m, first, last, e, scratch); };
  if (w.store == Store::u8) return w.asymmetric ? as(run<Store::u8, true>) : as(run<Store::u8, false>);
  return w.asymmetric ? as(run<Store::u4, true>) : as(run<Store::u4, false>);
}

}  // namespace

extern const Kernel kAmxBf16;
const Kernel kAmxBf16 = {"amx_bf16", "bf16",              Isa::amx_bf16,   supports<Maths>, row_bytes<Maths>,
                         prepare,    scratch_bytes<Maths>, multiply_on_tiles};

}  // namespace pareto
