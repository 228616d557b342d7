// Vectors of 4 lanes, which every x86-64 and ARM64 processor has; elsewhere the compiler takes them apart.
namespace pareto {
namespace {
constexpr int kLanes = 4, kAccs = 8, kDots = 8;
}
}  // namespace pareto

#include "loops.inl"

namespace pareto {

extern const Kernels kBaseline;
const Kernels kBaseline = {"baseline", Isa::baseline, kLanes, run, dots, sum};

}  // namespace pareto
