"""Open questions: answers of a model (`ctllm answer`), graded by other models (`ctllm judge`)."""
