"""The corpus stage beside datatrove's: documents per CPU second and memory of filters and deduplication, and what
deduplication finds of duplicates, and the search for benchmarks of items, that were planted.

    python benchmarks/corpus.py [--part filters|dedup|contamination|memory] [--quick]
        [--input 'raw/*.jsonl.gz' ...] [--folder DIR]

benchmarks/README.md says what is counted, and how.
"""

import argparse
import functools
import gzip
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence

from common import CTLLM, Cost, environment, finish, least, measure, middle, pin, table, take_turns
from corpus_contamination import ITEMS, write_contaminated
from corpus_contamination import score as score_hits
from corpus_inputs import write_corpus
from corpus_planted import SIMILAR, score, write_planted

from data_pipeline.shards import Layout

HERE = pathlib.Path(__file__).resolve().parent
PEERS = ("datatrove[io,processing]==0.10.1", "spacy==3.8.7", "jieba==0.42.1", "orjson==3.13.0")
FEW_MB, FILTERS_MB, DEDUP_MB, LARGE_MB = 0.05, 16, 40, (160, 640)


def main() -> None:
    """Runs the comparison and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["filters", "dedup", "contamination", "memory"], help="one part alone")
    parser.add_argument("--quick", action="store_true", help="small inputs, one round")
    parser.add_argument("--input", nargs="*", default=[], help="globs of Chinese documents; none: the sample's")
    parser.add_argument("--folder", help="keeps the inputs, and finds those that an earlier run made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(options.folder or scratch).resolve()
        python = environment("corpus", PEERS) if options.part in (None, "filters", "dedup") else ""
        pin()
        quick = options.quick
        rounds, large = (1, (2, 8)) if quick else (2, LARGE_MB)
        out, figures = pathlib.Path(scratch, "out"), {}
        if options.part in (None, "filters"):
            figures |= filters(folder, options.input, python, out, 2 if quick else FILTERS_MB, rounds)
        if options.part in (None, "dedup"):
            figures |= dedup(folder, options.input, python, out, 4 if quick else DEDUP_MB, rounds)
        if options.part in (None, "contamination"):
            figures |= contamination(folder, options.input, out, 4 if quick else DEDUP_MB, rounds, large)
        if options.part in (None, "memory"):
            figures |= memory(folder, options.input, out, large)
    ratios = {name: value for name, value in figures.items() if name.endswith("_ratio")}
    finish(ratios | figures | {"quick": quick})


def ours(script: str, documents: pathlib.Path, output: pathlib.Path, preset: str) -> Cost:
    """Our filters or our deduplication in a process of their own."""
    shutil.rmtree(output, ignore_errors=True)
    return measure([sys.executable, str(HERE / script), str(documents), str(output), preset])


def theirs(python: str, script: str, documents: pathlib.Path, output: pathlib.Path) -> Cost:
    """datatrove's."""
    shutil.rmtree(output, ignore_errors=True)
    return measure([python, str(HERE / script), str(documents.parent), str(output)])


def compare(title: str, few: pathlib.Path, many: pathlib.Path, count: int, runs: dict, rounds: int) -> dict[str, float]:
    """Runs contestants {name: function of the documents} in turns, prints their table; returns net CPU seconds.

    Net of the same on a few documents: what a start costs.
    """
    starts, costs = (
        take_turns({name: functools.partial(run, documents) for name, run in runs.items()}, rounds)
        for documents in (few, many)
    )
    net = {name: least(costs[name]) - least(starts[name]) for name in costs}
    megabytes = many.stat().st_size / 1e6
    table(
        f"{title}: {count:,} documents, {megabytes:.0f} MB",
        ("", "CPU s", "median", "start CPU s", "net CPU s", "documents/CPU s", "MB/CPU s", "MiB", "x datatrove"),
        [
            (
                name,
                least(costs[name]),
                middle(costs[name]),
                least(starts[name]),
                seconds,
                count / seconds,
                megabytes / seconds,
                max(run.peak_mib for run in costs[name]),
                net["datatrove"] / seconds,
            )
            for name, seconds in net.items()
        ],
    )
    return net


def filters(
    folder: pathlib.Path, patterns: Sequence[str], python: str, out: pathlib.Path, megabytes: float, rounds: int
) -> dict:
    """Every rule on, JSON lines in, kept and rejected documents out."""
    few, many = folder / "few" / "documents.jsonl", folder / f"{megabytes:g}mb" / "documents.jsonl"
    write_corpus(few, patterns, FEW_MB)
    count = write_corpus(many, patterns, megabytes)
    ours("corpus_filters.py", few, out / "compile", "default")  # numba compiles once for all that follows
    runs = {
        f"ctllm, {name}": functools.partial(ours, "corpus_filters.py", output=out / name, preset=name)
        for name in ("default", "ct_llm", "released")
    }
    runs["datatrove"] = functools.partial(theirs, python, "datatrove_filters.py", output=out / "datatrove")
    net = compare("filters", few, many, count, runs, rounds)
    return {
        "filters_ratio": net["datatrove"] / net["ctllm, default"],
        "filters_documents_per_cpu_s": {name: count / seconds for name, seconds in net.items()},
        "filters_documents": count,
    }


def dedup(
    folder: pathlib.Path, patterns: Sequence[str], python: str, out: pathlib.Path, megabytes: float, rounds: int
) -> dict:
    """Near duplicates, JSON lines in, survivors and duplicates out; and what was found of those that were planted."""
    few, many = folder / "few_planted" / "documents.jsonl", folder / f"{megabytes:g}mb_planted" / "documents.jsonl"
    write_planted(few, patterns, FEW_MB)
    count, key = write_planted(many, patterns, megabytes)
    ours("corpus_dedup.py", few, out / "compile", "default")
    runs = {
        f"ctllm, {name}": functools.partial(ours, "corpus_dedup.py", output=out / name, preset=preset)
        for name, preset in (("default", "default"), ("paper", "ct_llm"))
    }
    runs["datatrove"] = functools.partial(theirs, python, "datatrove_dedup.py", output=out / "datatrove")
    net = compare("deduplication", few, many, count, runs, rounds)
    scores = {
        "ctllm, default": score(key, _removed_by_us(out / "default")),
        "ctllm, paper": score(key, _removed_by_us(out / "paper")),
        "datatrove": score(key, _removed_by_datatrove(out / "datatrove")),
    }
    kinds = list(scores["datatrove"].by_kind)
    table(
        f"found of {scores['datatrove'].pairs:,} planted pairs with a Jaccard similarity of {SIMILAR:g} or more",
        ("", "recall", "precision", "removed", *kinds),
        [(n, s.recall, s.precision, s.removed, *(s.by_kind[kind] for kind in kinds)) for n, s in scores.items()],
    )
    return {
        "dedup_ratio": net["datatrove"] / net["ctllm, default"],
        "dedup_documents_per_cpu_s": {name: count / seconds for name, seconds in net.items()},
        "dedup_recall": {name: found.recall for name, found in scores.items()},
        "dedup_precision": {name: found.precision for name, found in scores.items()},
        "dedup_documents": count,
    }


def _removed_by_us(output: pathlib.Path) -> dict[str, str]:
    with gzip.open(Layout(str(output)).rejected(0, "dedup")) as lines:
        return {record["id"]: record["duplicate_of"] for record in map(json.loads, lines)}


def _removed_by_datatrove(output: pathlib.Path) -> dict[str, None]:
    return {json.loads(line)["id"]: None for path in (output / "removed").iterdir() for line in path.open()}


def contamination(
    folder: pathlib.Path,
    patterns: Sequence[str],
    out: pathlib.Path,
    megabytes: float,
    rounds: int,
    large: tuple[float, ...],
) -> dict:
    """`ctllm contamination`, JSON lines in, hits out; what was found of planted items; its memory as documents grow."""
    sizes = {size: folder / f"{size:g}mb_contaminated" for size in (FEW_MB, megabytes, *large)}
    counts = {size: write_contaminated(place, patterns, size) for size, place in sizes.items()}

    def run(size: float) -> Cost:
        shutil.rmtree(out / "seen", ignore_errors=True)
        flags = [
            f"--config.documents=('{sizes[size]}/documents.jsonl',)",
            f"--config.benchmarks.items=('{sizes[megabytes]}/items.jsonl',)",
        ]
        return measure([*CTLLM, "contamination", *flags, f"--workdir={out / 'seen'}"])

    run(FEW_MB)  # numba compiles once for all that follows
    peaks = {size: run(size).peak_mib for size in large}
    starts, costs = (take_turns({"": functools.partial(run, size)}, rounds)[""] for size in (FEW_MB, megabytes))
    found = score_hits(sizes[megabytes] / "key.json", out / "seen" / "hits.jsonl")
    seconds = least(costs) - least(starts)
    table(
        f"contamination: {counts[megabytes]:,} documents, {megabytes:g} MB, {ITEMS:,} items",
        ("", "CPU s", "start CPU s", "documents/CPU s", "recall", "precision", *found.by_kind),
        [
            ("ctllm", least(costs), least(starts), counts[megabytes] / seconds, found.recall, found.precision)
            + tuple(found.by_kind.values())
        ],
    )
    table("contamination: memory", ("MB", "MiB"), [(f"{size:g}", peak) for size, peak in peaks.items()])
    return {
        "contamination_documents_per_cpu_s": counts[megabytes] / seconds,
        "contamination_recall": found.recall,
        "contamination_precision": found.precision,
        "contamination_mib": {f"{size:g}": peak for size, peak in peaks.items()},
    }


def memory(folder: pathlib.Path, patterns: Sequence[str], out: pathlib.Path, sizes: tuple[float, ...]) -> dict:
    """Peak memory of our filters and our deduplication on inputs of several sizes: it must not grow with them."""
    rows, found = [], {}
    for megabytes in sizes:
        documents = folder / f"{megabytes:g}mb" / "documents.jsonl"
        planted = folder / f"{megabytes:g}mb_planted" / "documents.jsonl"
        count = write_corpus(documents, patterns, megabytes)
        planted_count, key = write_planted(planted, patterns, megabytes)
        filtered = ours("corpus_filters.py", documents, out / "memory", "default")
        rows.append((f"filters, {megabytes:g} MB", count, *_figures(count, filtered)))
        unique = ours("corpus_dedup.py", planted, out / "memory", "default")
        scored = score(key, _removed_by_us(out / "memory"))
        rows.append((f"deduplication, {megabytes:g} MB", planted_count, *_figures(planted_count, unique)))
        found[f"{megabytes:g}"] = {
            "filters_mib": filtered.peak_mib,
            "filters_own_mib": filtered.own_mib,
            "dedup_mib": unique.peak_mib,
            "dedup_own_mib": unique.own_mib,
            "dedup_recall": scored.recall,
            "dedup_precision": scored.precision,
        }
    heads = ("", "documents", "CPU s", "documents/CPU s", "MiB", "of it not mapped files")
    table("memory: default preset, one process", heads, rows)
    return {"memory": found}


def _figures(count: int, cost: Cost) -> tuple[float, ...]:
    return cost.cpu, count / cost.cpu, cost.peak_mib, cost.own_mib


if __name__ == "__main__":
    main()
