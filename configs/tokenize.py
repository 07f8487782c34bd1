"""Token stores: packed sequences that training reads by index.

ctllm tokenize --config.corpus=CORPUS --config.tokenizer=TOKENIZER --workdir=STORE
ctllm tokenize --config=configs/tokenize.py:chat --config.input=chats.jsonl --config.tokenizer=TOKENIZER --workdir=STORE
ctllm tokenize --config=configs/tokenize.py:preference --config.input=pairs.jsonl ... --workdir=STORE
"""

from ml_collections import ConfigDict, config_dict


def get_config(kind: str = "pretrain") -> ConfigDict:
    """`kind` is "pretrain", "chat" or "preference"."""
    return ConfigDict(
        dict(
            kind=kind,
            corpus=config_dict.placeholder(str),
            input=(),
            tokenizer="",
            template="ctllm",
            learn="assistant",
            sequence_length=4096 if kind == "pretrain" else 2048,
            packing="best_fit",
            validation_share=0.001 if kind == "pretrain" else 0.05,
            shards=0,
            seed=42,
            beam=dict(runner="local", options=()),
        )
    )
