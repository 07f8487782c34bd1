"""Which documents a training step saw, and which steps saw a document.

    ctllm trace --workdir=runs/pretrain --step=1200
    ctllm trace --workdir=runs/pretrain --spike=3
    ctllm trace --workdir=runs/pretrain --document=zh_cc-000017 --json

The run directory is only read. A line a document: row and tokens [begin, end) of the global batch, epoch (from 0),
source, id, place of the first token within the document, URL, text. Texts are decoded from the very tokens that were
learned; URLs need the corpus and, like `ctllm corpus`, the data extra.

A spike is a logged step whose loss lies furthest above the median of the 64 logged before it, measured in their
deviation: (loss - median) / max(1.4826 MAD, 0.01 |median|).
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "step": config_dict.placeholder(int),
            "spike": config_dict.placeholder(int),
            "document": config_dict.placeholder(str),
            "store": config_dict.placeholder(str),
            "corpus": config_dict.placeholder(str),
            "text_chars": 200,
            "json": False,
        }
    )
