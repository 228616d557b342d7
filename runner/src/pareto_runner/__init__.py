"""Runs Pareto's benchmarks: accuracy, memory and latency of every technique, side by side."""
