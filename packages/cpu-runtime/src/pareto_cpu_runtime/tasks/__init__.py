"""Tasks that the runtime's questions are asked on, beside those of ``pareto_core``."""
