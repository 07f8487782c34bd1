"""Multiple choice by log-likelihood, of the tasks that `ctllm_jax.evaluate.questions` reads."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ctllm_jax.common.manifest import fingerprint
from ctllm_jax.evaluate.questions import LoadedTask, render
from ctllm_jax.evaluate.scoring import encode_pair, score
from ctllm_jax.loading import LoadedModel

# What a choice's log-likelihood is divided by before the largest wins: (choice text, tokens) -> divisor.
NORMS: dict[str, Callable[[str, int], float]] = {
    "sum": lambda text, tokens: 1.0,
    "characters": lambda text, tokens: float(len(text)),
    "bytes": lambda text, tokens: float(len(text.encode())),
    "tokens": lambda text, tokens: float(tokens),
}


def evaluate_choice(model: LoadedModel, loaded: LoadedTask, bos: bool, batch_tokens: int) -> tuple[dict, list[dict]]:
    """Scores a task.

    Returns:
      ({questions, cut: contexts that lost tokens, protocol, accuracy: by norm, see `accuracies`}, one log
      entry for each question).
    """
    rendered = [render(loaded, question) for question in loaded.questions]
    pairs = [
        encode_pair(model.tokenizer, prompt, loaded.task.delimiter + text, bos)
        for prompt, texts in rendered
        for text in texts
    ]
    scores = iter(score(model, pairs, batch_tokens, loaded.task.name))
    log = []
    for question, (prompt, texts) in zip(loaded.questions, rendered, strict=True):
        own = [next(scores) for _ in texts]
        picked = {
            name: int(np.argmax([s.sum_logprob / norm(t, s.tokens) for s, t in zip(own, texts, strict=True)]))
            for name, norm in NORMS.items()
        }
        log.append(
            {
                "id": question.id,
                "language": question.language,
                "prompt": prompt,
                "choices": texts,
                "answer": question.answer,
                "logprobs": [s.sum_logprob for s in own],
                "tokens": [s.tokens for s in own],
                "is_greedy": [s.is_greedy for s in own],
                "cut": max(s.cut for s in own),
                "picked": picked,
            }
        )
    languages = [entry["language"] for entry in log]
    result = {
        "questions": len(log),
        "cut": sum(entry["cut"] > 0 for entry in log),
        "protocol": fingerprint([loaded.protocol, bos, model.config.max_length]),
        "accuracy": {
            name: accuracies([entry["picked"][name] == entry["answer"] for entry in log], languages) for name in NORMS
        },
    }
    return result, log


def accuracies(right: Sequence[bool], groups: Sequence[str]) -> dict:
    """Averages over questions (micro) and over groups (macro), with standard errors.

    The standard error of a mean is the sample deviation over the root of n (None for a single question); that
    of the macro average is the root of the groups' summed variances over their number.
    """
    by_group: dict[str, list[bool]] = {}
    for value, group in zip(right, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    means = {group: _mean(values) for group, values in sorted(by_group.items())}
    errors = [entry["stderr"] for entry in means.values()]
    macro_error = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return {
        "micro": _mean(right),
        "macro": {"mean": float(np.mean([entry["mean"] for entry in means.values()])), "stderr": macro_error},
        "groups": means,
    }


def _mean(values: Sequence[bool]) -> dict:
    array = np.asarray(values, np.float64)
    stderr = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return {"mean": float(array.mean()), "stderr": stderr, "n": len(array)}
