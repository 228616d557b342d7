// Vectors of 8 lanes: AVX2 with FMA.
#ifdef __x86_64__
namespace pareto {
namespace {
constexpr int kLanes = 8, kAccs = 8, kDots = 8;
}
}  // namespace pareto

#include "loops.inl"

namespace pareto {

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", Isa::avx2, kLanes, run, dots, sum};

}  // namespace pareto
#endif
