"""MAP-CC as a TFDS dataset: one config per subset, TFRecord, written by Beam; a document is found by its id.

Reading needs nothing from here: `tfds.load("map_cc/zh_cc", data_dir=WORKDIR)`, `tfds.builder_from_directory`
and SeqIO's `TfdsDataSource` find the dataset by its folder. The order of records depends on their ids alone.
"""

import bisect
import contextlib
import dataclasses
import io
import itertools
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import apache_beam as beam
import numpy as np
import orjson
import tensorflow as tf
import tensorflow_datasets as tfds
import xxhash
from etils import epath

from ctllm_jax.common.errors import UserError
from data_pipeline.documents import SUBSETS
from data_pipeline.runner import BeamConfig, make_options, make_pipeline, make_runner
from data_pipeline.shards import Layout, read_lines, save_array, save_bytes

FIELDS = ("id", "url", "source", "text", "meta", "signals")  # the last two are JSON
INDEX = "ids.npy"  # beside the shards: where each id's record lies
_ENTRY = np.dtype([("hash", "<u8"), ("shard", "<u4"), ("offset", "<u8")])
_MERGED = 1 << 26  # of them that are sorted at once, about: by estimate some 4 GB
_HEADER, _FOOTER = 12, 4  # bytes of a TFRecord around its payload: length and its CRC, then the payload's CRC


class _StableWriter(tfds.core.writer.ExampleWriter):
    """Writes an example's features in the order of their names; protobuf leaves it to chance, run by run."""

    def write(self, path: epath.Path, examples: Iterable[tuple[bytes, bytes]]) -> Iterable[Any] | None:
        return super().write(path, ((key, _stable(packed)) for key, packed in examples))


def _stable(packed: bytes) -> bytes:
    return tf.train.Example.FromString(packed).SerializeToString(deterministic=True)


class MapCC(tfds.core.GeneratorBasedBuilder):
    """The documents that filters and deduplication left. Building needs the earlier stages' `layout`."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look for checksums of downloads beside this module: there are none
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=subset) for subset in SUBSETS]

    def __init__(self, *, layout: Layout | None = None, shards: int = 0, **kwargs):
        self._layout, self._shards = layout, shards
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Documents with their source, metadata and every value that the filters measured.",
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in FIELDS}),
            disable_shuffling=False,
        )

    def _example_writer(self) -> tfds.core.writer.ExampleWriter:
        return _StableWriter(self.info.file_format)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, beam.PTransform]:
        subset = self.builder_config.name
        if self._layout is None:  # TFDS builds what it does not find
            raise UserError(f"{self.data_dir}: no such subset here; `ctllm corpus` leaves out those without documents")
        shards = [n for n in range(self._shards) if self._layout.written(n, subset).exists()]
        return {"train": self._generate_examples(shards, subset)}

    def _generate_examples(self, shards: list[int], subset: str) -> beam.PTransform:
        return beam.Create(shards) | beam.Reshuffle() | beam.FlatMap(_examples, subset, self._layout)


def _examples(shard: int, subset: str, layout: Layout) -> Iterator[tuple[str, dict[str, str]]]:
    """(id, example) of one shard's documents that deduplication left."""
    for record in read_lines(layout.written(shard, subset)):
        packed = {name: orjson.dumps(record[name]).decode() for name in ("meta", "signals")}
        yield record["id"], {name: record[name] for name in FIELDS} | packed


def write(subset: str, shards: int, layout: Layout, runner: BeamConfig) -> pathlib.Path:
    """Builds one subset below `layout.root`, unless it is there; returns its folder."""
    tfds.disable_progress_bar()
    builder = MapCC(config=subset, data_dir=layout.root, layout=layout, shards=shards)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of a download, and there is none
        builder.download_and_prepare(
            download_dir=layout.work / "downloads",  # stays empty
            download_config=tfds.download.DownloadConfig(
                beam_runner=make_runner(runner), beam_options=make_options(runner), try_download_gcs=False
            ),
        )
    folder = pathlib.Path(builder.data_dir)
    if not (folder / INDEX).exists():
        _write_index(folder, layout, runner)
    return folder


def subset_folders(corpus: str | os.PathLike) -> dict[str, str]:
    """{subset: its TFDS folder} of a finished `ctllm corpus` folder."""
    found = pathlib.Path(corpus, "map_cc").glob(f"*/{MapCC.VERSION}/{INDEX}")
    return {path.parent.parent.name: str(path.parent) for path in sorted(found)}


def shard_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The TFRecord files of a subset, in the order that its index numbers them."""
    return sorted(folder.glob("*.tfrecord-*"))


def _write_index(folder: pathlib.Path, layout: Layout, runner: BeamConfig) -> None:
    parts = layout.work / "index" / folder.parent.name
    with make_pipeline(runner) as pipeline:
        numbered = [(number, str(path)) for number, path in enumerate(shard_files(folder))]
        _ = pipeline | beam.Create(numbered) | beam.Reshuffle() | beam.Map(_index_file, parts)
    _merge(sorted(parts.glob("*.npy")), folder / INDEX)


def _merge(parts: list[pathlib.Path], index: pathlib.Path) -> None:
    """Writes sorted parts as one, by ranges of hashes that fit into memory; equal hashes stay in the parts' order."""
    size = sum(len(np.load(path, mmap_mode="r")) for path in parts)
    ranges = size // _MERGED + 1
    bounds = [(number << 64) // ranges for number in range(ranges + 1)]
    with save_bytes(index) as file:
        header = {"descr": np.lib.format.dtype_to_descr(_ENTRY), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(file, header)
        for low, high in itertools.pairwise(bounds):
            entries = np.concatenate([_between(np.load(path, mmap_mode="r"), low, high) for path in parts])
            file.write(entries[np.argsort(entries["hash"], kind="stable")].tobytes())


def _between(entries: np.ndarray, low: int, high: int) -> np.ndarray:
    """A copy of the entries with low <= hash < high of a sorted array, without reading the others."""
    first, last = (bisect.bisect_left(entries, bound, key=_hash) for bound in (low, high))
    return np.array(entries[first:last])


def _hash(entry: np.void) -> int:
    return int(entry["hash"])


def _index_file(numbered: tuple[int, str], parts: pathlib.Path) -> None:
    shard, path = numbered
    entries = []
    with open(path, "rb") as file:
        offset = 0
        while feature := read_record(file):
            entries.append((xxhash.xxh3_64_intdigest(feature["id"].bytes_list.value[0]), shard, offset))
            offset = file.tell()
    entries = np.array(entries, _ENTRY)
    save_array(parts / f"{shard:05d}.npy", entries[np.argsort(entries["hash"], kind="stable")])


def read_record(file: BinaryIO) -> Mapping[str, tf.train.Feature] | None:
    """The features of the TFRecord that begins here, None at the file's end; leaves the file behind it."""
    header = file.read(_HEADER)
    if not header:
        return None
    payload = file.read(struct.unpack("<Q", header[:8])[0])
    file.seek(_FOOTER, os.SEEK_CUR)
    return tf.train.Example.FromString(payload).features.feature


@dataclasses.dataclass(frozen=True)
class MapCcDocument:
    """A document of MAP-CC, with `meta` and `signals` decoded."""

    id: str
    url: str
    source: str
    text: str
    meta: dict
    signals: dict


def find(folder: str | os.PathLike, identity: str) -> MapCcDocument | None:
    """The document called `identity` in `folder` (MAP-CC, or one of its subsets), or None.

    Reads the index through a memory map and one record. Raises UserError if there is no index in the folder.
    """
    indexes = sorted(pathlib.Path(folder).rglob(INDEX))
    if not indexes:
        raise UserError(f"{folder}: no MAP-CC subset here ({INDEX} is missing); name the map_cc folder of a corpus")
    key = xxhash.xxh3_64_intdigest(identity.encode())
    for path in indexes:
        shards = shard_files(path.parent)
        for entry in _between(np.load(path, mmap_mode="r"), key, key + 1):
            with open(shards[entry["shard"]], "rb") as file:
                file.seek(int(entry["offset"]))
                feature = read_record(file)
            values = {name: feature[name].bytes_list.value[0].decode() for name in FIELDS}
            if values["id"] == identity:
                return MapCcDocument(**values | {name: orjson.loads(values[name]) for name in ("meta", "signals")})
    return None
