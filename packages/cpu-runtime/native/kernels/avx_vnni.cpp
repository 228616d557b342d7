// int8 compute on AVX_VNNI: vpdpbusd for 8 lanes, without AVX-512.
#include "int8.inl"
#include "lanes8.inl"

namespace pareto {
namespace {

struct Vnni8 : Lanes8 {
  static Ints dot(Ints acc, Ints codes, Ints row) { return _mm256_dpbusd_avx_epi32(acc, codes, row); }
};

using Maths = Int8<Vnni8>;

}  // namespace

extern const Kernel kAvxVnni;
const Kernel kAvxVnni = {"avx_vnni",     "int8",          Isa::avx_vnni,        supports<Maths>, row_bytes<Maths>,
                         Maths::prepare, scratch_bytes<Maths>, multiply<Maths>};

}  // namespace pareto
