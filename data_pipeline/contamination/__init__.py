"""Items of benchmarks in training data: found by the n-grams that they share, wherever the text lies."""
