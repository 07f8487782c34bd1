"""Measuring a model: held-out text, benchmarks. `run` is `ctllm eval`; judged sets are in `judged`."""
