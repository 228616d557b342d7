// Vectors of 16 lanes: AVX-512 F.
#ifdef __x86_64__
namespace pareto {
namespace {
constexpr int kLanes = 16, kAccs = 4, kDots = 16;
}
}  // namespace pareto

#include "loops.inl"

namespace pareto {

extern const Kernels kAvx512f;
const Kernels kAvx512f = {"avx512f", Isa::avx512f, kLanes, run, dots, sum};

}  // namespace pareto
#endif
