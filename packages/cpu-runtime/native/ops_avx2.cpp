#define PARETO_OPS kOpsAvx2
#define PARETO_OPS_NAME "avx2"
#include "ops.inl"
