"""A document's whole story, from a folder of `ctllm corpus`, which is only read.

    ctllm explain --workdir=runs/corpus zh_cc-000017
    ctllm explain --workdir=runs/corpus --json zh_cc-000017 zh_cc-000018

Where it stood in the input, what was measured and the limits, what it repeats or what repeats it, benchmarks that it
holds, and the text that went out or was left out.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"documents": (), "text_chars": 1000, "json": False})
