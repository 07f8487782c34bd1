"""Scores of a checkpoint: held-out perplexity beside a unigram baseline, multiple choice, samples.

    ctllm eval --config.model=runs/pretrain --config.perplexity.store=data/store --workdir=runs/pretrain-eval
    ctllm eval --config.model=hf/CT-LLM-Base --config.tasks="('tasks/ceval.json',)" --workdir=runs/ctllm-eval

One device is enough (sizes estimated, not measured).
A scoring batch of 4,096 tokens needs 2.1 GB for the 2B model's logits, beside 8.6 GB of
parameters; `batch_tokens` changes speed and memory only. Expect a table on standard output, scores.json, and
one log line per question under parts/.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": "",
            "step": config_dict.placeholder(int),
            "dtype": config_dict.placeholder(str),
            "perplexity": {
                "store": "",
                "split": "validation",
                "rows": 2_000,
                "baseline_rows": 20_000,
            },
            "tasks": (),
            "bos": True,
            "prompts": (),
            "chat": False,
            "sampling": {
                "max_tokens": 128,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "seed": 0,
            },
            "batch_tokens": 4_096,
        }
    )
