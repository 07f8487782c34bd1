"""Two evaluations, item by item: differences, and how likely they are by chance.

    ctllm compare runs/base-eval runs/sft-eval
    ctllm compare runs/base-eval runs/sft-eval --workdir=runs/compared

Both are finished folders of `ctllm eval`; benchmarks that both have in the same protocol, on the same items, are
compared. Expect a table on standard output, and with --workdir comparison.json.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"evaluations": (), "draws": 10_000})
