"""Tokens: how fast documents become a token store, how full its rows are, how fast it is read and opened.

    python benchmarks/tokens.py [--quick] [--part PART] [--input 'raw/*.jsonl.gz' ...] [--folder DIR]

tokenize   the whole `ctllm tokenize` against datatrove's tokenizer stage: same vocabulary, same text, one core
packing    share of padded positions, beside simpler ways to fill rows
reader     tokens per second and core out of a store, its memory, beside a bare memory map and Grain
start      seconds from opening a store of a billion tokens to a batch anywhere in it

benchmarks/README.md says what is counted, and how.
"""

import argparse
import collections
import functools
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
from common import Cost, environment, finish, least, measure, middle, pin, table, take_turns
from token_inputs import Inputs, write_synthetic_store
from token_readers import BATCH, LENGTH

from ctllm_jax.cli import main as ctllm
from ctllm_jax.data.store import TokenStore, open_store
from ctllm_jax.data.tokenizer import EOS, load_tokenizer

HERE = pathlib.Path(__file__).resolve().parent
PEERS = (
    "datatrove[io,processing]==0.10.1",
    "tokenizers==0.23.3",
    "grain==0.2.18",
    "array_record==0.8.6",
    "msgpack==1.2.4",
)


def main() -> None:
    """Runs the parts that are asked for and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs, one round")
    parser.add_argument("--part", choices=("tokenize", "packing", "reader", "start"), help="only this one")
    parser.add_argument("--input", nargs="*", default=[], help="globs of documents; none: made from the sample")
    parser.add_argument("--folder", help="keeps what is prepared, and finds what an earlier run prepared")
    options = parser.parse_args()
    parts, figures = [options.part] if options.part else ["tokenize", "packing", "reader", "start"], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(options.folder or scratch).resolve()
        python = environment("tokens", PEERS) if {"tokenize", "reader"} & {*parts} else ""
        if {"tokenize", "packing"} & {*parts}:
            inputs = Inputs(folder, options.input, 32_000 if options.input else 4000, 1500 if options.quick else 25_000)
        pin()
        if "tokenize" in parts:
            figures |= tokenize(inputs, python, pathlib.Path(scratch, "out"), rounds=1 if options.quick else 3)
        if "packing" in parts:
            figures |= packing(inputs, folder)
        if "reader" in parts:
            store = _synthetic(folder, 20_000_000 if options.quick else 200_000_000)
            figures |= reader(store, python, batches=100 if options.quick else 1000)
        if "start" in parts:
            store = _synthetic(folder, 20_000_000 if options.quick else 1_000_000_000)
            figures |= start(store, processes=2 if options.quick else 7)
    ratios = {name: value for name, value in figures.items() if name.endswith("_ratio")}
    finish(ratios | figures | {"quick": options.quick})


def _synthetic(folder: pathlib.Path, tokens: int) -> pathlib.Path:
    """A synthetic store below the folder."""
    store = folder / f"synthetic-{tokens}"
    write_synthetic_store(store, tokens)
    return store


# ---- tokenize


def tokenize(inputs: Inputs, python: str, scratch: pathlib.Path, rounds: int) -> dict:
    """What tokenizing costs us and datatrove, with and without what a start costs, and whether both agree."""
    starts, costs = _tokenizing_costs(inputs, python, scratch, rounds)
    own, other = _our_documents(scratch / "ctllm"), _their_documents(scratch / "datatrove")
    differing = sum((collections.Counter(own) - collections.Counter(other)).values())
    tokens = sum(len(document) for document in other) // 4
    net = {name: least(costs[name]) - least(starts[name]) for name in costs}
    table(
        f"tokenize: {len(other):,} documents, {tokens:,} tokens; {differing} documents with other ids",
        ("", "CPU s", "median", "wall s", "start CPU s", "net CPU s", "M tokens/CPU s", "net", "x datatrove", "net"),
        [
            (
                name,
                least(runs),
                middle(runs),
                min(run.wall for run in runs),
                least(starts[name]),
                net[name],
                tokens / least(runs) / 1e6,
                tokens / net[name] / 1e6,
                least(costs["datatrove"]) / least(runs),
                net["datatrove"] / net[name],
            )
            for name, runs in costs.items()
        ],
    )
    figures = {
        "tokenize_ratio": net["datatrove"] / net["ctllm"],
        "tokenize_with_start_ratio": least(costs["datatrove"]) / least(costs["ctllm"]),
        "tokenize_differing_documents": differing,
        "tokenize_tokens": tokens,
        "tokenize_net_cpu_s": net,
    }
    if "ctllm, tokenizer.json" in net:
        figures["tokenize_same_library_ratio"] = net["datatrove"] / net["ctllm, tokenizer.json"]
    return figures


def _tokenizing_costs(
    inputs: Inputs, python: str, scratch: pathlib.Path, rounds: int
) -> tuple[dict[str, list[Cost]], dict[str, list[Cost]]]:
    """CPU seconds of whole processes, ours and datatrove's: on a few documents (what a start costs), and on all."""
    tokenizers = {"ctllm": inputs.model}
    if rounds > 1:
        tokenizers["ctllm, tokenizer.json"] = inputs.tokenizer_json

    def ours(tokenizer: pathlib.Path, corpus: pathlib.Path, output: str) -> Cost:
        shutil.rmtree(scratch / output, ignore_errors=True)
        flags = [f"--config.corpus={corpus}", f"--config.tokenizer={tokenizer}", f"--workdir={scratch / output}"]
        return measure([sys.executable, "-m", "ctllm_jax.cli", "tokenize", *flags])

    def theirs(documents: pathlib.Path, output: str) -> Cost:
        shutil.rmtree(scratch / output, ignore_errors=True)
        arguments = [str(documents), str(inputs.tokenizer_json), str(scratch / output), EOS]
        one_thread = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        return measure([python, str(HERE / "datatrove_tokenize.py"), *arguments], **one_thread)

    full = {name: functools.partial(ours, file, inputs.corpus, name) for name, file in tokenizers.items()}
    full["datatrove"] = functools.partial(theirs, inputs.documents, "datatrove")
    few = {name: functools.partial(ours, file, inputs.few, "few") for name, file in tokenizers.items()}
    few["datatrove"] = functools.partial(theirs, inputs.few_documents, "few")
    return take_turns(few, rounds), take_turns(full, rounds)


def _our_documents(folder: pathlib.Path) -> list[bytes]:
    """The ids of every document of a store, as int32 bytes, without the mark of its beginning."""
    store, found = open_store(folder), []
    first = 0 if load_tokenizer(store.tokenizer_folder).bos_id is None else 1
    for split in store.info["splits"]:
        for source in store.sources(split):
            found += [tokens[first:].tobytes() for tokens in _documents(store, split, source)]
    return found


def _documents(store: TokenStore, split: str, source: str) -> Iterator[np.ndarray]:
    """The documents of a source, each whole again where rows hold parts of it."""
    parts = collections.defaultdict(dict)
    for row in store.rows(split, source):
        ends = np.cumsum(row.lengths)
        for place, (identity, length) in enumerate(zip(row.ids, row.lengths, strict=True)):
            begin = row.starts[place] if len(row.starts) else 0
            parts[identity][begin] = row.tokens[ends[place] - length : ends[place]]
    for pieces in parts.values():
        whole = np.zeros(max(begin + len(piece) for begin, piece in pieces.items()), np.int32)
        for begin, piece in pieces.items():
            whole[begin : begin + len(piece)] = piece
        yield whole


def _their_documents(folder: pathlib.Path) -> list[bytes]:
    """The ids of every document that datatrove wrote, as int32 bytes."""
    found = []
    for file in folder.glob("tokens/*.ds"):
        width = int(file.with_name(f"{file.name}.metadata").read_text().split("\n")[0].rpartition("|")[2])
        tokens = np.fromfile(file, {2: "<u2", 4: "<u4"}[width]).astype(np.int32)
        ends = np.fromfile(file.with_name(f"{file.name}.index"), "<u8").astype(np.int64)
        found += [part.tobytes() for part in np.split(tokens, ends[:-1])]
    return found


# ---- packing


def packing(inputs: Inputs, folder: pathlib.Path) -> dict:
    """Share of positions that hold no token, in the store and in rows filled in simpler ways."""
    rows, figures = [], {}
    for length in (2048, 4096):
        place = folder / f"store-{length}"
        flags = [f"--config.corpus={inputs.corpus}", f"--config.tokenizer={inputs.model}"]
        ctllm(["tokenize", *flags, f"--config.sequence_length={length}", f"--workdir={place}"])
        store = open_store(place)
        entries = store.info["splits"]["train"].values()
        padded = 1 - sum(entry["tokens"] for entry in entries) / (length * sum(entry["rows"] for entry in entries))
        sizes = [[len(text) for text in _documents(store, "train", source)] for source in store.sources("train")]
        tokens, documents = sum(map(sum, sizes)), sum(map(len, sizes))
        long = sum(size > length for own in sizes for size in own)  # cut by every way that pads
        ways = {
            "ctllm": (padded, long),
            "one document a row": (1 - tokens / (length * sum(one_a_row(own, length) for own in sizes)), long),
            "in order": (1 - tokens / (length * sum(in_order(own, length) for own in sizes)), long),
            "concatenate and cut": (0.0, sum(cut_anywhere(own, length) for own in sizes)),
        }
        for name, (share, cut) in ways.items():
            rows.append((f"{length}: {name}", 100 * share, cut, 100 * cut / documents))
        figures[f"packing_padded_{length}"] = padded
    table(f"packing: {documents:,} documents", ("row length: way", "% padded", "documents cut", "% cut"), rows)
    return figures


def one_a_row(sizes: list[int], length: int) -> int:
    """Rows where no two documents share one."""
    return sum(-(-size // length) for size in sizes)


def in_order(sizes: list[int], length: int) -> int:
    """Rows where a document that does not fit into the open row begins the next one; long ones are cut first."""
    rows, room = 0, 0
    for size in sizes:
        for part in [length] * (size // length) + [size % length]:
            if part > room:
                rows, room = rows + 1, length
            room -= part
    return rows


def cut_anywhere(sizes: list[int], length: int) -> int:
    """Documents that are cut where all are laid end to end and rows are cut out of that."""
    ends = np.cumsum(sizes)
    return int(np.sum((ends - sizes) // length != (ends - 1) // length))


# ---- reader and start


def reader(store: pathlib.Path, python: str, batches: int) -> dict:
    """Tokens per second of one core, and resident memory early and late."""
    pythons = {"memmap": sys.executable, "ctllm": sys.executable, "grain": python}

    def run(name: str) -> Cost:
        command = [pythons[name], str(HERE / "token_readers.py"), name, str(store), str(batches)]
        return measure(command, JAX_PLATFORMS="cpu")

    costs = take_turns({name: functools.partial(run, name) for name in pythons}, rounds=1 if batches < 1000 else 3)
    found = {name: [json.loads(run.output.splitlines()[-1]) for run in runs] for name, runs in costs.items()}
    best = {name: max(result["tokens_per_cpu_s"] for result in results) for name, results in found.items()}
    table(
        f"reader: {batches} batches of {BATCH} x {LENGTH}",
        ("", "M tokens/CPU s", "median", "M tokens/s", f"MiB after {batches // 10}", f"MiB after {batches}"),
        [
            (
                name,
                best[name] / 1e6,
                float(np.median([result["tokens_per_cpu_s"] for result in results])) / 1e6,
                max(result["tokens_per_wall_s"] for result in results) / 1e6,
                results[0]["early_mib"],
                results[0]["late_mib"],
            )
            for name, results in found.items()
        ],
    )
    return {
        "reader_to_memmap_ratio": best["ctllm"] / best["memmap"],
        "reader_to_grain_ratio": best["ctllm"] / best["grain"],
        "reader_tokens_per_cpu_s": best["ctllm"],
        "reader_memory_growth_mib": max(result["late_mib"] - result["early_mib"] for result in found["ctllm"]),
    }


def start(store: pathlib.Path, processes: int) -> dict:
    """Seconds to the first batch in fresh processes, each at a step of its own. The page cache is warm."""
    found = []
    for _ in range(processes):
        command = [sys.executable, str(HERE / "token_readers.py"), "start", str(store), "0"]
        found.append(json.loads(measure(command, JAX_PLATFORMS="cpu").output.splitlines()[-1]))
    seconds = [result["seconds"] for result in found]
    info = open_store(store).info["splits"]["train"].values()
    tokens, shards = LENGTH * sum(entry["rows"] for entry in info), sum(len(entry["shards"]) for entry in info)
    table(
        f"start: a store of {tokens:,} tokens in {shards} shards",
        ("", "seconds", "farthest step"),
        [
            ("fastest", min(seconds), ""),
            ("median", float(np.median(seconds)), ""),
            ("slowest", max(seconds), max(result["step"] for result in found)),
        ],
    )
    return {"start_tokens": tokens, "start_seconds": float(np.median(seconds)), "start_seconds_most": max(seconds)}


if __name__ == "__main__":
    main()
