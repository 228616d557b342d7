// fp32 compute on AVX512F.
#include "fp32.inl"
#include "lanes16.inl"

namespace pareto {
namespace {

using Maths = Fp32<Lanes16>;

}  // namespace

extern const Kernel kAvx512f;
const Kernel kAvx512f = {"avx512f",           "fp32",          Isa::avx512f,             supports<Maths>, row_bytes<Maths>,
                    Maths::prepare, scratch_bytes<Maths>, multiply<Maths>};

}  // namespace pareto
