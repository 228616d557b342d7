#define PARETO_OPS kOpsAvx512Bf16
#define PARETO_OPS_NAME "avx512_bf16"
#include "ops.inl"
