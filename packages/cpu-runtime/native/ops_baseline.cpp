#define PARETO_OPS kOpsBaseline
#define PARETO_OPS_NAME "scalar"
#include "ops.inl"
