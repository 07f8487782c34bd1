"""Scores of several models as one table, beside those that CT-LLM reported.

    ctllm table runs/base-eval
    ctllm table runs/sft-eval runs/dpo-eval --reported=aligned --workdir=runs/table
    ctllm table runs/eval-*0B --reported=checkpoints --workdir=runs/curve

Evaluations are finished folders of `ctllm eval`; the benchmarks that one of them has are the columns. Markdown goes to
standard output; --workdir gets table.md, table.tex (booktabs), table.json and, with matplotlib
(`pip install 'ctllm-jax[plots]'`), table.png. `reported` is a table of arXiv 2404.04167: base, aligned, checkpoints
(scores over training tokens), or '' for none. `contamination`, a folder of `ctllm contamination` over the training
data, adds the scores without the items that it found, and of those alone.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"evaluations": (), "reported": "base", "contamination": ""})
