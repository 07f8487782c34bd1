"""Marks from 1 to 10 for a model's answers, by a judge at an OpenAI-compatible endpoint; or a comparison of two models.

    ctllm judge --config.answers="('runs/sft-answers',)" --config.judges.judge.model=MODEL --workdir=runs/sft-marks
    ctllm judge --config.answers="('runs/sft-answers', 'runs/dpo-answers')" ... --workdir=runs/sft-against-dpo
    ctllm judge --config=configs/judge.py:one+other --config.judges.one.model=MODEL --config.judges.other.url=URL ...

The second form asks in both orders; the third has two judges, each with keys of its own. No accelerator is needed. The
key is read from the environment variable that `key` names, and from nowhere else. `samples` above 1 shows how far a
judge repeats itself. What a killed or interrupted run has paid for is kept and not asked again. Expect scores.json,
judgements.jsonl, and a table on standard output.
"""

from ml_collections import ConfigDict, config_dict


def get_config(judges: str = "judge") -> ConfigDict:
    """`judges` are names of your own, with a + between them."""
    judge = {
        "url": "https://api.openai.com/v1",
        "model": "",
        "key": "OPENAI_API_KEY",
        "max_tokens": 2_048,
        "limit_name": "max_tokens",
    }
    return ConfigDict(
        {
            "answers": (),
            "judges": {name: {**judge, "temperature": config_dict.placeholder(float)} for name in judges.split("+")},
            "samples": 1,
            "draws": 10_000,
            "calls": {
                "at_once": 8,
                "timeout_seconds": 120.0,
                "attempts": 10,
                "first_wait_seconds": 1.0,
                "longest_wait_seconds": 300.0,
                "keep_refused": False,
            },
            "budget": {
                "requests": config_dict.placeholder(int),
                "tokens": config_dict.placeholder(int),
            },
        }
    )
