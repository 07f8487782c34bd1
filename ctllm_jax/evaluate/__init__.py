"""Measuring a model: held-out perplexity, multiple choice, samples. `evaluate.run` is the verb `ctllm eval`."""
