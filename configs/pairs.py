"""Preference pairs of a model's own answers, ranked by a judge or by a function, for another round of DPO.

    ctllm pairs --config.model=runs/sft --config.input="('chats.jsonl',)" --config.judges.judge.model=M --workdir=DIR
    ctllm pairs --config.model=runs/sft --config.input="('chats.jsonl',)" --config.reward=mine.py:reward --workdir=DIR
    ctllm pairs --config.earlier=DIR --config.margin=2 --workdir=OTHER

Prompts are those of conversations (all before the last answer) and of preference records. A judge is asked as by
`ctllm judge`; a function is called with the prompt's messages, the answer and the record's own answer or None, and
gives a number. The third line takes the answers and marks of the first. Where the accelerator has no network, give
neither judge nor function there, and the folder as `earlier` to a second run elsewhere. Expect answers.jsonl,
marks.jsonl, and pairs.jsonl for `ctllm tokenize --config=configs/tokenize.py:preference`.
"""

from ml_collections import ConfigDict, config_dict

from configs import judge
from configs.sampling import sampling


def get_config() -> ConfigDict:
    asking = judge.get_config()
    return ConfigDict(
        {
            "model": "",
            "step": config_dict.placeholder(int),
            "dtype": config_dict.placeholder(str),
            "tensor": 1,
            "input": (),
            "answers": 4,
            "slots": 16,
            "sampling": sampling(max_tokens=1_024, temperature=1.0),
            "earlier": config_dict.placeholder(str),
            "judges": asking.judges,
            "samples": 1,
            "references": True,
            "calls": asking.calls,
            "budget": asking.budget,
            "reward": config_dict.placeholder(str),
            "margin": 1.0,
        }
    )
