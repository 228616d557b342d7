"""SignRound: whether each weight is rounded up or down is learned by signed gradient descent.

W. Cheng, W. Zhang, H. Shen, Y. Cai, X. He, K. Lv, Y. Liu, "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs", first version, 2023, https://arxiv.org/abs/2309.05516v1.

W~ = s * (clip(round(W / s + zp + V), n, m) - zp), V in [-0.5, 0.5] from 0; 200 steps of lr 1 / 200 falling linearly,
8 rows a step, block after block. Grids are those of plain rounding. Unlike the paper, the result is the best, over all
of the calibration, of the best step's, the last step's and plain rounding: it is never worse there than RTN.
"""

from __future__ import annotations

from pareto_cpu_runtime.quantise.matrix import QuantisedLinear
from pareto_cpu_runtime.quantise.rounding import tune
from pareto_cpu_runtime.quantise.stage import Stage


def quantise_stage(stage: Stage) -> dict[str, QuantisedLinear]:
    """Quantise the operators of a stage by learned rounding."""
    return tune(stage, clips=False)
