"""What other thresholds would keep of a corpus, by subset, counted on the signals that `ctllm corpus` stored.

    ctllm sweep --workdir=runs/corpus
    ctllm sweep --workdir=runs/corpus --config.rules="('top_2gram.max=0.1,0.15,0.2,0.3', 'han.min=0.5,0.7')" --json

Without rules, every limit of the corpus at 0.5 to 2 times its threshold. Any measure may be asked for, also one without
a limit. `*` marks the threshold that the corpus was made with.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"rules": (), "json": False})
