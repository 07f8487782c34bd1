"""The tokenizer of a corpus.

ctllm tokenizer --config.corpus=CORPUS --workdir=TOKENIZER
ctllm tokenizer --config=configs/tokenizer.py:given --config.corpus=CORPUS --config.model=MODEL --workdir=TOKENIZER

The first trains one, the second takes a SentencePiece .model or a tokenizer.json as it is; both measure it on the
corpus. 125,696 pieces, as the tokenizer that CT-LLM used (Baichuan2's), need a large sample; a smaller corpus needs a
smaller `vocab_size`, and SentencePiece says so.
"""

from ml_collections import ConfigDict, config_dict

from configs.arguments import checked


def get_config(kind: str = "train") -> ConfigDict:
    """`kind` is "train" or "given"."""
    training = dict(
        vocab_size=125_696,
        sample_bytes=2_000_000_000,  # SentencePiece is estimated to need 25 times as much memory
        character_coverage=0.9999,
        weights={},
        seed=42,
        threads=2,
    )
    return ConfigDict(
        dict(
            corpus="",
            model=config_dict.placeholder(str),
            report_bytes=20_000_000,
            **(training if checked(kind, ("train", "given")) == "train" else dict.fromkeys(training)),
        )
    )
