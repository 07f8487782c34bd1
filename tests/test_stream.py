"""The stream of batches: the same bytes for any number of hosts, from any step, from a disk or from gs://."""

import collections
import hashlib

import numpy as np
import pytest
from tiny_stores import packed_row, write_store

from ctllm_jax.data.batches import DataConfig, RateChange, Stream, make_stream
from ctllm_jax.data.store import open_store

BATCH, STEPS, LENGTH = 16, 1000, 24
RATES = {"zh": 0.7, "en": 0.25, "code": 0.05}
CHANGES = (RateChange(400, {"zh": 1.0, "code": 1.0}), RateChange(701, {"en": 0.9, "zh": 0.1}))


@pytest.fixture(scope="module", params=[3, 7])  # fewer shards than hosts; neither divides rows or hosts
def folder(request, tmp_path_factory):
    random = np.random.default_rng(request.param)
    sizes = {"zh": 1501, "en": 401, "code": 37}
    rows = {name: [packed_row(random, LENGTH, f"{name}{i}") for i in range(size)] for name, size in sizes.items()}
    made = write_store(tmp_path_factory.mktemp("store"), {"train": rows}, "pretrain", LENGTH, shards=request.param)
    return made.folder


def stream_of(folder, changes=CHANGES) -> Stream:
    store = open_store(folder)  # every host opens the store on its own
    return make_stream(DataConfig(str(folder), RATES, changes, True), store, BATCH, seed=1)


def digest(folder, hosts: int, steps: range) -> str:
    """Hash of the global batches of some steps, put together from what each host reads."""
    streams, share, content = [stream_of(folder) for _ in range(hosts)], BATCH // hosts, hashlib.sha256()
    for step in steps:
        parts = [stream.arrays(step, range(h * share, (h + 1) * share)) for h, stream in enumerate(streams)]
        for name in sorted(parts[0]):
            content.update(np.concatenate([part[name] for part in parts]).tobytes())
    return content.hexdigest()


def test_a_thousand_batches_are_the_same_bytes_for_any_number_of_hosts(folder):
    alone = digest(folder, 1, range(STEPS))
    assert {digest(folder, hosts, range(STEPS)) for hosts in (2, 4, 8)} == {alone}


@pytest.mark.parametrize("start", [1, 399, 400, 777])
def test_it_begins_at_any_step(folder, start):
    stream, expected = stream_of(folder), hashlib.sha256()
    for step in range(STEPS):  # read from the start
        arrays = stream.arrays(step, range(BATCH))
        if start <= step < start + 40:
            for name in sorted(arrays):
                expected.update(arrays[name].tobytes())
    assert {digest(folder, hosts, range(start, start + 40)) for hosts in (1, 8)} == {expected.hexdigest()}


def test_an_epoch_shows_each_document_once_and_the_next_one_again(folder):
    stream, shown = stream_of(folder, ()), collections.defaultdict(list)
    for step in range(STEPS):
        for place in stream.places(step):
            shown[place.source, place.epoch].append(place.index)
    for (source, epoch), rows in shown.items():
        size = stream.store.size("train", source)
        whole = (source, epoch + 1) in shown
        assert len(set(rows)) == len(rows) and (set(rows) == set(range(size)) or not whole)
    assert shown["code", 19] and shown["zh", 7] and shown["en", 8]
