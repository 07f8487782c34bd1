"""Benchmarks: what their figures rest on, and that they run to their last line."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import TEXT, tiny_tokenizer

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import token_inputs
import token_readers
import tokens
from tokenizer_json import write_tokenizer_json

from ctllm_jax.data.store import open_store
from ctllm_jax.data.tokenizer import load_tokenizer

AWKWARD = [
    "",
    " ",
    "   缩进 \t制表  ",
    "第一行\n\n第二行\r\n",
    "价格是1234567.89元",
    "emoji 🀄🧧 與繁體",
    "<s>不是标记</s><|user|>",
    "▁ 下划线",
]


def test_the_same_vocabulary_gives_the_same_ids_in_both_libraries(tmp_path):
    model = tiny_tokenizer()
    converted = load_tokenizer(write_tokenizer_json(model.file, tmp_path))
    assert converted.encode_batch(TEXT + AWKWARD) == model.encode_batch(TEXT + AWKWARD)
    assert (converted.bos_id, converted.eos_id, converted.vocab_size) == (model.bos_id, model.eos_id, model.vocab_size)


def test_simpler_ways_to_fill_rows():
    assert tokens.one_a_row([3, 4, 9], 4) == 1 + 1 + 3
    assert tokens.in_order([3, 2, 2, 4, 9, 3], 4) == 1 + 1 + 1 + 3  # 3 | 2 2 | 4 | 4 | 4 | 1 3
    assert tokens.cut_anywhere([3, 5, 4], 4) == 1  # the second, at 4; it ends where a row does


def test_readers_of_a_synthetic_store_give_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(token_inputs, "_ROWS_OF_SHARD", 16)
    store = tmp_path / "store"
    assert token_inputs.write_synthetic_store(store, 1_200_000) == 19 * 16 * 4096  # more shards than are distinct
    assert {source: open_store(store).size("train", source) for source in ("zh_cc", "en", "code")} == {
        "zh_cc": 10 * 16,
        "en": 5 * 16,
        "code": 4 * 16,
    }
    ours, floor = (next(reader(str(store))) for reader in (token_readers.ctllm, token_readers.memmap))
    rows = {row.tobytes(): place for place, row in enumerate(np.load(store / "tokens.npy").astype(np.int32))}
    assert all(row.tobytes() in rows for batch in (ours, floor) for row in batch["tokens"])
    for name in floor:
        assert ours[name].shape == floor[name].shape and ours[name].dtype == floor[name].dtype


@pytest.mark.slow
@pytest.mark.parametrize(("part", "figure"), [("packing", "packing_padded_4096"), ("start", "start_seconds")])
def test_a_part_ends_with_its_figures_in_one_line_of_json(part, figure):
    """The parts that need no peers, and so no package index."""
    command = [sys.executable, tokens.__file__, "--quick", "--part", part]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    figures = json.loads(lines[-1])
    assert figures["quick"] and 0 <= figures[figure] < (0.5 if part == "packing" else 10)
