"""Conversations chosen by what a model says of their answers: perplexity, instruction-following difficulty.

    ctllm select --config=configs/select.py:coig_pc --config.input="('coig.jsonl',)" --config.model=MODEL --workdir=DIR
    ctllm select --config.scores=DIR --config.ifd.most=0.9 --config.hardest=0.1 --workdir=OTHER

The first line scores and selects, with CT-LLM's limit for its Chinese data; `open_hermes` has the one for the English
data. Both hold for Qwen-7B's perplexities: other models have others, which the printed quantiles show. The second line
tries other limits on the same values. Expect kept.jsonl for `ctllm tokenize`, rejected.jsonl and scored.jsonl.
"""

from ml_collections import ConfigDict, config_dict

from configs.arguments import checked

_MOST = {"ifd": None, "coig_pc": 3000.0, "open_hermes": 350.0}  # perplexity


def get_config(name: str = "ifd") -> ConfigDict:
    """`name` is "coig_pc", "open_hermes", or "ifd": whatever an instruction makes likelier."""
    config = ConfigDict(
        {
            "input": (),
            "model": "",
            "step": config_dict.placeholder(int),
            "dtype": config_dict.placeholder(str),
            "tensor": 1,
            "template": config_dict.placeholder(str),
            "batch_tokens": 16_384,
            "scores": config_dict.placeholder(str),
            "perplexity": {"least": config_dict.placeholder(float), "most": config_dict.placeholder(float)},
            "ifd": {"least": config_dict.placeholder(float), "most": config_dict.placeholder(float)},
            "hardest": 1.0,
        }
    )
    config.perplexity.most = _MOST[checked(name, _MOST)]
    config.ifd.most = 1.0 if name == "ifd" else None
    return config
