"""SeqIO mixtures by shares of tokens.

The paper's rates are of tokens, SeqIO's are of examples: a source's rate is its share of tokens over the mean number of
tokens that an example of it has, which a finished store tells.

    from configs.mixtures import CT_LLM_TOKEN_SHARES
    from data_pipeline.mixtures import register
    register("CORPUS", "STORE", CT_LLM_TOKEN_SHARES, missing="drop")

registers the tasks and mixtures that `register` names. SeqIO, or what is built on it, then knows them by name:

    seqio.get_dataset("ct_llm_documents", {"targets": 2048}, seqio.DecoderFeatureConverter(pack=True))
    seqio.get_dataset("ct_llm_rows", {"targets": 4096}, seqio.PrePackedLMFeatureConverter())
"""

import math
import os
import sys
from collections.abc import Mapping

import seqio

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, read_json
from ctllm_jax.data.store import open_store
from data_pipeline.map_cc import subset_folders
from data_pipeline.store_tasks import store_tasks
from data_pipeline.tasks import corpus_tasks


def register(
    corpus: str | os.PathLike,
    store: str | os.PathLike,
    token_shares: Mapping[str, float],
    missing: str = "error",
    name: str = "ct_llm",
) -> dict[str, str]:
    """Registers all that a corpus and the store made from it hold, with the store's tokenizer and held-out share.

    Tasks of each source: map_cc_SOURCE (documents), NAME_rows_SOURCE (the store's packed rows), NAME_segments_SOURCE.
    Mixtures of `token_shares`: NAME_documents and NAME_rows.

    Args:
      corpus: folder of `ctllm corpus`.
      store: folder of `ctllm tokenize`, kind pretrain.
      token_shares, missing: see `token_mixture`.
      name: what the names begin with.

    Returns:
      {"documents": name of the mixture, "rows": name of the mixture}.
    """
    opened = open_store(store)
    if opened.kind != "pretrain":
        raise UserError(f"{store}: a store of kind {opened.kind}; a mixture with documents needs one of kind pretrain")
    held_out = read_json(as_path(store) / "stage.json")["settings"]["validation_share"]
    documents = corpus_tasks(subset_folders(corpus), opened.tokenizer, held_out)
    rows = store_tasks(store, packed=True, prefix=name)
    store_tasks(store, packed=False, prefix=name)
    return {
        unit: token_mixture(f"{name}_{unit}", tasks, token_shares, mean_tokens(store, unit), missing)
        for unit, tasks in (("documents", documents), ("rows", rows))
    }


def token_mixture(
    name: str,
    tasks: Mapping[str, str],
    token_shares: Mapping[str, float],
    tokens_per_example: Mapping[str, float],
    missing: str = "error",
) -> str:
    """Registers a mixture whose sources come, in the mean, at these shares of tokens; returns its name.

    Shares hold for whole examples: a converter that cuts long ones lowers their sources' part.

    Args:
      name: of the mixture.
      tasks: {source: task name}.
      token_shares: {source: share}, of any positive sum. A share of 0 leaves a source out.
      tokens_per_example: {source: mean tokens of an example}, see `mean_tokens`.
      missing: "error", or "drop": what to do about sources that have a share and no task. The shares of those that
        are left keep their proportions; which were dropped is printed.

    Raises:
      UserError: a source without task, share or mean; a share that is no share; nothing left.
    """
    if missing not in ("error", "drop"):
        raise UserError(f"missing {missing!r} is unknown; there are: error, drop")
    for source, share in token_shares.items():
        if not (math.isfinite(share) and share >= 0):
            raise UserError(f"mixture {name}: the share of {source} is {share}; it must be 0 or more")
    wanted = {source: share for source, share in token_shares.items() if share}
    absent = [source for source in wanted if source not in tasks]
    if absent and missing == "error":
        raise UserError(
            f"mixture {name}: shares are given for {', '.join(absent)}, the tasks have {', '.join(sorted(tasks))}; "
            'add the sources, set their shares to 0, or say missing="drop" to share their part among the others'
        )
    if unasked := [source for source in tasks if source not in token_shares]:
        raise UserError(f"mixture {name}: no share is given for {', '.join(unasked)}; 0 leaves a source out")
    kept = {source: share for source, share in wanted.items() if source in tasks}
    if not kept:
        raise UserError(f"mixture {name}: no source is left")
    if unknown := [source for source in kept if not tokens_per_example.get(source)]:
        raise UserError(f"mixture {name}: how many tokens examples of {', '.join(unknown)} have is not known")
    if absent:
        left = ", ".join(f"{source} {share / sum(kept.values()):.2%}" for source, share in kept.items())
        print(f"mixture {name}: dropped {', '.join(absent)}; shares of tokens now: {left}", file=sys.stderr)
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, [(tasks[s], share / tokens_per_example[s]) for s, share in kept.items()])
    return name


def mean_tokens(store: str | os.PathLike, unit: str) -> dict[str, float]:
    """{source: mean tokens} of a store's training "documents" or "rows", exactly, from its manifest.

    Raises:
      UserError: another unit; or documents of a store that is not of kind pretrain, where each token of a document but
        the first is learned once.
    """
    opened = open_store(store)
    entries = opened.info["splits"]["train"]
    present = {source: entry for source, entry in entries.items() if entry["rows"]}
    if unit == "rows":
        return {source: entry["tokens"] / entry["rows"] for source, entry in present.items()}
    if unit != "documents" or opened.kind != "pretrain":
        raise UserError(f"{store}: mean tokens of {unit}: there are those of rows and, of kind pretrain, of documents")
    return {source: entry["learned"] / entry["documents"] + 1 for source, entry in present.items()}


def shares_of_rounds(tokens: Mapping[str, int], rounds: Mapping[str, float]) -> dict[str, float]:
    """Shares of tokens when each source is gone through a number of times.

    As MAP-NEO's `parse_mixture.py` does: weight = int(tokens * rounds). CT-LLM went through some English twice.

    Raises:
      UserError: a source has tokens and no rounds, or rounds and no tokens; nothing is left.
    """
    if differ := sorted(tokens.keys() ^ rounds.keys()):
        raise UserError(f"tokens and rounds name different sources: {', '.join(differ)}")
    weights = {source: int(count * rounds[source]) for source, count in tokens.items()}
    if sum(weights.values()) <= 0 or min(weights.values()) < 0:
        raise UserError(f"rounds {dict(rounds)} leave no tokens")
    return {source: weight / sum(weights.values()) for source, weight in weights.items()}
