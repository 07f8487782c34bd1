"""One page with the curves of training runs, side by side.

    ctllm report runs/pretrain
    ctllm report runs/lr-1e-3 runs/lr-3e-3 --workdir=runs/compared
    ctllm report runs/pretrain --card --config.scores="('runs/pretrain-eval',)"

Runs are folders of `ctllm train`: finished, cut short, or still at work; they are only read. The page, report.html,
needs no network. It goes into --workdir, or without it into the first run's folder; writing it again brings it up to
date. `card` adds MODEL_CARD.md and DATA_CARD.md, filled from the run's config, log, store and corpus; what no file
tells is called unknown, what only people know is left to be filled in.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"runs": (), "smooth": 0.02, "card": False, "scores": ()})
