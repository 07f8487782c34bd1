"""Stores on gs://, read from a server on this machine through the libraries that read the real one."""

import gzip
import shutil

import gcsfs.retry
import jax
import numpy as np
import pytest
from fake_gcs import serving
from tiny_models import tiny_tokenizer
from tiny_stores import tiny_store

from ctllm_jax.common.errors import Unanswered, UserError
from ctllm_jax.common.files import expand, file_digest, identity, read_json
from ctllm_jax.data.batches import DataConfig, global_batch, make_stream
from ctllm_jax.data.store import open_store
from ctllm_jax.sharding import MeshConfig, make_mesh
from data_pipeline import records

STORE = "gs://bucket/deep/store"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("buckets")
    tiny_store(root / "bucket" / "deep" / "store")
    with serving(root) as server, pytest.MonkeyPatch.context() as patch:
        url = f"http://127.0.0.1:{server.server_port}"
        patch.setenv("STORAGE_EMULATOR_HOST", url)  # gcsfs
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask another service
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", url)  # ArrayRecord
        yield server


def local(server) -> str:
    return str(server.root / "bucket" / "deep" / "store")


def stream_of(folder: str):
    return make_stream(DataConfig(folder, {"zh": 0.75, "en": 0.25}, (), True), open_store(folder), 8, seed=5)


def test_files_are_found_read_and_identified_as_local_ones_are(server):
    assert read_json(f"{STORE}/manifest.json") == read_json(f"{local(server)}/manifest.json")
    found = expand([f"{STORE}/*.array_record"])
    assert [name.rpartition("/")[2] for name in found] == [
        name.rpartition("/")[2] for name in expand([f"{local(server)}/*.array_record"])
    ]
    for mark in (identity, file_digest):
        assert [mark(name) for name in found] == [mark(name.replace(STORE, local(server))) for name in found]
    with pytest.raises(UserError, match="no file matches 'gs://bucket/deep/store/none"):
        expand([f"{STORE}/none-*"])


def test_records_on_a_bucket_are_read_as_local_ones_are(server):
    folder = server.root / "bucket" / "records"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"id": 1}\n{"id": 2}\n', encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"id": 3}\n'))
    for name in ("a.jsonl", "b.jsonl.gz"):
        near, far = ([*records.entries(f"{root}/{name}")] for root in (folder, "gs://bucket/records"))
        assert near == far and near[0][1]["id"] in (1, 3)


def test_batches_from_a_bucket_are_those_from_the_disk(server):
    near, far = stream_of(local(server)), stream_of(STORE)
    mesh = make_mesh(MeshConfig(2, -1, 1, 1), jax.devices())
    for step in (0, 5):
        jax.tree.map(np.testing.assert_array_equal, global_batch(far, step, mesh), global_batch(near, step, mesh))
    assert far.store.find("train", "zh", "train-zh-7.0") == [7]


def test_the_tokenizer_comes_from_the_bucket(server):
    assert open_store(STORE).tokenizer.digest == tiny_tokenizer().digest


def test_opening_a_store_reads_its_manifest_and_a_listing_only(server):
    server.requests.clear()
    stream_of(STORE).places(1000)
    assert not [path for path in server.requests if "array_record" in path and "alt=media" in path]


def test_what_is_missing_or_cut_short_in_a_bucket_is_refused_by_name(server):
    copy = server.root / "bucket" / "damaged"
    shutil.copytree(local(server), copy)
    shard = sorted(copy.glob("train-zh-*.array_record"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"gs://bucket/damaged/{shard.name}: changed or cut short"):
        list(open_store("gs://bucket/damaged").rows("train", "zh"))
    shard.unlink()
    with pytest.raises(UserError, match=f"gs://bucket/damaged/{shard.name}: a shard of the token store is missing"):
        open_store("gs://bucket/damaged")
    with pytest.raises(UserError, match=r"gs://bucket/nowhere: not a finished folder"):
        open_store("gs://bucket/nowhere")


def test_a_storage_that_refuses_is_not_called_damage(server):
    """It refuses ArrayRecord a row of an open shard, then gcsfs a shard and a store that are to be opened."""
    store = open_store(STORE)
    store.read("train", "zh", [0])
    said = "array_record cannot be read now .*; nothing was changed; this account needs the right to read it"
    object_of = "/storage/v1/b/bucket/o/deep/store/train-zh-0000{}-of-00002.array_record?alt=media"
    for row, refused in ((5, object_of.format(0)), (40, "/download" + object_of.format(1))):
        server.refusals.append(refused)
        with pytest.raises(UserError, match=said) as raised:
            store.read("train", "zh", [row])
        assert "damaged" not in str(raised.value) and not server.refusals
        store.read("train", "zh", [row])
    server.refusals.append("manifest.json?alt=media")
    with pytest.raises(UserError, match=f"{STORE} cannot be read now .*; this account needs the right to read it"):
        open_store(STORE)


def test_a_storage_that_does_not_answer_is_not_called_damage(server, monkeypatch):
    """gcsfs finds nobody there as a shard is to be opened."""
    store = open_store(STORE)
    monkeypatch.setattr(gcsfs.retry, "is_retriable", lambda _: False)
    server.down = True
    try:
        with pytest.raises(
            Unanswered, match="array_record cannot be read now .*; the same command goes on once it can"
        ):
            store.read("train", "en", [0])
    finally:
        server.down = False
