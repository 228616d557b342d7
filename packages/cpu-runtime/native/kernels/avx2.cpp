// fp32 compute on AVX2.
#include "fp32.inl"
#include "lanes8.inl"

namespace pareto {
namespace {

using Maths = Fp32<Lanes8>;

}  // namespace

extern const Kernel kAvx2;
const Kernel kAvx2 = {"avx2",           "fp32",          Isa::avx2,             supports<Maths>, row_bytes<Maths>,
                    Maths::prepare, scratch_bytes<Maths>, multiply<Maths>};

}  // namespace pareto
