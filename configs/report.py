"""One page with the curves of training runs, side by side.

    ctllm report runs/pretrain
    ctllm report runs/lr-1e-3 runs/lr-3e-3 --workdir=runs/compared

Runs are folders of `ctllm train`: finished, cut short, or still at work; they are only read. The page, report.html,
needs no network. It goes into --workdir, or without it into the first run's folder; writing it again brings it up to
date.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"runs": (), "smooth": 0.02})
