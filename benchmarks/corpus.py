"""The corpus stage: how many documents our filters judge per CPU second, beside datatrove's, and in what memory.

    python benchmarks/corpus.py [--quick] [--input 'raw/*.jsonl.gz' ...] [--folder DIR]

benchmarks/README.md says what is counted, and how.
"""

import argparse
import functools
import pathlib
import shutil
import sys
import tempfile

from common import Cost, environment, finish, least, measure, middle, pin, table, take_turns
from corpus_inputs import write_corpus

HERE = pathlib.Path(__file__).resolve().parent
PEERS = ("datatrove[io,processing]==0.10.1", "spacy==3.8.7", "jieba==0.42.1", "orjson==3.13.0")
FEW_MB, COMPARED_MB, LARGE_MB = 0.05, 16, (40, 160)


def main() -> None:
    """Runs the comparison and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs, one round")
    parser.add_argument("--input", nargs="*", default=[], help="globs of Chinese documents; none: the sample's")
    parser.add_argument("--folder", help="keeps the inputs, and finds those that an earlier run made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(options.folder or scratch).resolve()
        python = environment("corpus", PEERS)
        pin()
        figures = filters(
            folder, options.input, python, pathlib.Path(scratch, "out"), 2 if options.quick else COMPARED_MB,
            rounds=1 if options.quick else 2,
        )  # fmt: skip
        figures |= memory(folder, options.input, pathlib.Path(scratch, "out"), (2, 8) if options.quick else LARGE_MB)
    ratios = {name: value for name, value in figures.items() if name.endswith("_ratio")}
    finish(ratios | figures | {"quick": options.quick})


def ours(documents: pathlib.Path, output: pathlib.Path, preset: str) -> Cost:
    """Our filters in a process of their own."""
    return measure([sys.executable, str(HERE / "corpus_filters.py"), str(documents), str(output), preset])


def filters(folder, patterns, python: str, out: pathlib.Path, megabytes: float, rounds: int) -> dict:
    """CPU seconds of whole processes, and of the same on a few documents: what a start costs."""

    def theirs(documents: pathlib.Path) -> Cost:
        shutil.rmtree(out / "datatrove", ignore_errors=True)
        return measure([python, str(HERE / "datatrove_filters.py"), str(documents.parent), str(out / "datatrove")])

    def contestants(documents: pathlib.Path) -> dict:
        presets = ("default", "ct_llm", "released")
        own = {f"ctllm, {name}": functools.partial(ours, documents, out / name, name) for name in presets}
        return own | {"datatrove": functools.partial(theirs, documents)}

    few, many = folder / "few" / "documents.jsonl", folder / f"{megabytes:g}mb" / "documents.jsonl"
    write_corpus(few, patterns, FEW_MB)
    count = write_corpus(many, patterns, megabytes)
    ours(few, out / "compile", "default")  # numba compiles once for all that follows
    starts, costs = take_turns(contestants(few), rounds), take_turns(contestants(many), rounds)
    net = {name: least(costs[name]) - least(starts[name]) for name in costs}
    table(
        f"filters: {count:,} documents, {many.stat().st_size / 1e6:.0f} MB",
        ("", "CPU s", "median", "start CPU s", "net CPU s", "documents/CPU s", "MB/CPU s", "MiB", "x datatrove"),
        [
            (
                name,
                least(runs),
                middle(runs),
                least(starts[name]),
                net[name],
                count / net[name],
                many.stat().st_size / 1e6 / net[name],
                max(run.peak_mib for run in runs),
                net["datatrove"] / net[name],
            )
            for name, runs in costs.items()
        ],
    )
    return {
        "filters_ratio": net["datatrove"] / net["ctllm, default"],
        "filters_documents_per_cpu_s": {name: count / seconds for name, seconds in net.items()},
        "filters_documents": count,
    }


def memory(folder, patterns, out: pathlib.Path, sizes: tuple[float, ...]) -> dict:
    """Peak memory of our filters on inputs of several sizes: it must not grow with them."""
    rows, found = [], {}
    for megabytes in sizes:
        documents = folder / f"{megabytes:g}mb" / "documents.jsonl"
        count = write_corpus(documents, patterns, megabytes)
        cost = ours(documents, out / "memory", "default")
        rows.append((f"{megabytes:g} MB", count, cost.cpu, cost.peak_mib))
        found[f"{megabytes:g}"] = cost.peak_mib
    table("memory: default filters, one process", ("", "documents", "CPU s", "MiB"), rows)
    return {"filters_peak_mib": found}


if __name__ == "__main__":
    main()
