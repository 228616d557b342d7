#define PARETO_OPS kOpsAvx512
#define PARETO_OPS_NAME "avx512f"
#include "ops.inl"
