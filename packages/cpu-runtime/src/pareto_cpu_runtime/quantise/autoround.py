"""AutoRound: SignRound that also learns how far each group's extremes are clipped.

W. Cheng, W. Zhang, H. Shen, Y. Cai, X. He, K. Lv, Y. Liu, "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs", 2024 (later versions), https://arxiv.org/abs/2309.05516.

As :mod:`pareto_cpu_runtime.quantise.signround`, with s = (max(W) * alpha - min(W) * beta) / (2^bits - 1), alpha and
beta in [0, 1] from 1, learned with the same step length. Symmetric grids take the larger of the two clipped extremes.
"""

from __future__ import annotations

from pareto_cpu_runtime.quantise.matrix import QuantisedLinear
from pareto_cpu_runtime.quantise.rounding import tune
from pareto_cpu_runtime.quantise.stage import Stage


def quantise_stage(stage: Stage) -> dict[str, QuantisedLinear]:
    """Quantise the operators of a stage by learned rounding and clipping."""
    return tune(stage, clips=True)
