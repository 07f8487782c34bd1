"""`ctllm corpus --config.pilot`: a sample that stands for the whole, and leaves nothing behind."""

import dataclasses

import numpy as np
import pytest
from test_corpus import config, jsonl, prose

from ctllm_jax.common.errors import UserError
from data_pipeline import corpus
from data_pipeline.documents import DocumentReader, Fields, find_inputs
from data_pipeline.pilot import sample

FIELDS = Fields("id", "url", "source", "text")


def lines_of(file):
    return [document.line for document in DocumentReader(file, FIELDS, "zh_cc", 1 << 20)]


def test_a_sample_is_the_same_every_time_and_its_half_is_a_part_of_it(tmp_path):
    files = find_inputs([str(jsonl(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(4000)]))])
    ((file,), within) = sample(files, 0.1)
    assert within == pytest.approx(0.1)
    whole, half = (lines_of(dataclasses.replace(file, share=share)) for share in (within, within / 2))
    assert abs(len(whole) - 400) < 80 and abs(len(half) - 200) < 60 and set(half) < set(whole)
    assert lines_of(dataclasses.replace(file, share=within)) == whole


def test_of_many_files_some_are_taken_whole(tmp_path):
    for i in range(400):
        jsonl(tmp_path / f"{i:03d}.jsonl", [{"text": "x" * 100}])
    files = find_inputs([f"{tmp_path}/*.jsonl"])
    chosen, within = sample(files, 0.25)
    assert (len(chosen), within) == (100, 1) and [file.index for file in chosen] == list(range(100))
    chosen, within = sample(files, 0.01)
    assert len(chosen) == 16 and within == pytest.approx(0.25)
    for share in (1, -0.1, 7):
        with pytest.raises(UserError, match="share between 0 and 1"):
            sample(files, share)


@pytest.mark.slow
def test_a_pilot_comes_near_the_whole_and_leaves_nothing_behind(tmp_path, capsys):
    random = np.random.default_rng(5)
    records = [{"text": prose(random) if i % 4 else "太短。"} for i in range(1200)]
    path = jsonl(tmp_path / "a.jsonl", records)
    found = corpus.run(config([path], pilot=0.4), str(tmp_path / "corpus"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]
    funnel = dict(found["funnel"])
    assert 1000 < funnel["read"] < 1400 and 0.7 < funnel["near dedup"] / funnel["read"] < 0.8
    assert found["share"] == pytest.approx(0.4) and found["seconds"] > 0
    whole = corpus.run(config([path]), str(tmp_path / "corpus"))
    assert whole["totals"]["read"] == 1200
    for name in ("map_cc", "rejected", "signals", "hashes"):
        size = sum(file.stat().st_size for file in (tmp_path / "corpus" / name).rglob("*") if file.is_file())
        assert 0.6 < found["bytes"][name] / size < 1.6, name
    assert "pilot of 40.00%" in capsys.readouterr().err
