"""Token stores: packed sequences that training reads by index.

ctllm tokenize --config.corpus=CORPUS --config.tokenizer=TOKENIZER --workdir=STORE
ctllm tokenize --config=configs/tokenize.py:chat --config.input=chats.jsonl --config.tokenizer=TOKENIZER --workdir=STORE
ctllm tokenize --config=configs/tokenize.py:chat@4:1 --config.input=chats.jsonl ... --workdir=STORE
ctllm tokenize --config=configs/tokenize.py:preference --config.input=pairs.jsonl ... --workdir=STORE

`chat@4:1` takes all Chinese conversations and a quarter as many English ones, as one of CT-LLM's SFT mixtures does; a
record's `language` tells them apart, or else the script of its messages.
"""

from ml_collections import ConfigDict, config_dict

from configs.arguments import checked
from configs.mixtures import CT_LLM_SFT_RATIOS


def get_config(kind: str = "pretrain") -> ConfigDict:
    """`kind` is "pretrain", "chat" or "preference"; after an @ may follow a ratio of languages (CT_LLM_SFT_RATIOS)."""
    kind, _, ratio = kind.partition("@")
    checked(kind, ("pretrain", "chat", "preference"))
    return ConfigDict(
        dict(
            kind=kind,
            corpus=config_dict.placeholder(str),
            input=(),
            tokenizer="",
            template="ctllm",
            learn="assistant",
            ratio=ConfigDict(CT_LLM_SFT_RATIOS[checked(ratio, CT_LLM_SFT_RATIOS)] if ratio else {}),
            sequence_length=4096 if kind == "pretrain" else 2048,
            keep="start",
            packing="best_fit",
            validation_share=0.001 if kind == "pretrain" else 0.05,
            shards=0,
            seed=42,
            beam=dict(runner="local", options=()),
        )
    )
