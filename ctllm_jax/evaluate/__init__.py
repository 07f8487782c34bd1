"""Measuring a model: held-out text, benchmarks, own questions. `run` is `ctllm eval`; judged sets are in `judged`."""
