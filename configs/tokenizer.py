"""The tokenizer of a corpus.

    ctllm tokenizer --config.corpus=CORPUS --workdir=TOKENIZER

125,696 pieces, as the tokenizer that CT-LLM used (Baichuan2's), need a sample of several GB; a smaller corpus needs a
smaller `vocab_size`, and SentencePiece says so.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            corpus="",
            vocab_size=125_696,
            sample_bytes=8_000_000_000,
            character_coverage=0.9999,
            weights={},
            seed=42,
            threads=2,
        )
    )
