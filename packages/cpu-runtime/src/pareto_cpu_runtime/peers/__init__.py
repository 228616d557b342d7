"""Comparison with other runtimes on the same weights, in turns: ``python -m pareto_cpu_runtime.peers --out DIR``."""
