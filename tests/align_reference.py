"""What TRL and torch computed on a tiny model: batches, losses, trajectories of alignment training."""

import json

import numpy as np
from flax import traverse_util
from tiny_models import REFERENCE

from ctllm_jax import hf
from ctllm_jax.data.record import Row

ALIGN = REFERENCE / "align"


def golden(name: str) -> dict:
    """The content of one of the reference files."""
    return json.loads((ALIGN / f"{name}.json").read_text())


def preference_pairs() -> list[Row]:
    """The reference's eight preference pairs, answers learned."""
    rows = []
    for entry in golden("dpo_inputs")["rows"]:
        sides = [entry["prompt_ids"] + entry[side] for side in ("chosen_ids", "rejected_ids")]
        given = len(entry["prompt_ids"])
        mask = np.concatenate([np.arange(len(side)) >= given for side in sides]).astype(np.uint8)
        rows.append(Row(np.concatenate(sides).astype(np.int32), [len(s) for s in sides], ["", ""], mask, 0))
    return rows


def sft_rows(case: dict) -> list[Row]:
    """TRL's batch: ids with labels of -100 where nothing is learned."""
    rows = []
    for ids, seen, labels in zip(case["input_ids"], case["attention_mask"], case["labels"], strict=True):
        size = sum(seen)
        mask = (np.array(labels[:size]) != -100).astype(np.uint8)
        rows.append(Row(np.array(ids[:size], np.int32), [size], [""], mask, 0))
    return rows


# What of a conversation each of TRL's modes learns, as our templates name it.
LEARNED = {
    "completion_only": "last",
    "dft": "last",
    "full_sequence": "all",
    "assistant_only": "assistant",
    "assistant_only_trunc128": "assistant",
}


def conversations(case: dict) -> list[list[dict]]:
    """The messages that a batch was made from."""
    return [row["messages"] if "messages" in row else row["prompt"] + row["completion"] for row in case["rows"]]


def assert_diagnostics(sums: dict, expected: dict, atol: float) -> None:
    """Rewards and log-probabilities, as means over pairs, are TRL's."""
    count = float(sums["count"])
    names = {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected", "margin": "rewards/margins"}
    names |= {"accuracy": "rewards/accuracies", "logprob_chosen": "logps/chosen", "logprob_rejected": "logps/rejected"}
    for own, theirs in names.items():
        np.testing.assert_allclose(sums[own] / count, expected[theirs], rtol=1e-5, atol=atol, err_msg=own)


def torch_names(config, params) -> dict[str, np.ndarray]:
    """Our parameters under transformers' names and in its shapes."""
    found = {}
    leaves = traverse_util.flatten_dict(params, sep="/")
    for path, names in hf.names_by_path(config).items():
        leaf = np.asarray(leaves[path])
        for layer, name in enumerate(names):
            own = leaf[layer] if path.startswith("layers/") else leaf
            found[name] = own.reshape(hf.their_shape(own.shape, name, True)[::-1]).T if hf.TABLE[path][1] else own
    return found
