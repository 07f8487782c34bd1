"""Whole benchmarks twice, with different batches, once killed and taken up again: are the answers the same?

    python benchmarks/repeat_eval.py --model RUN --data BENCHMARKS [--tasks ceval_ppl cmmlu_ppl mmlu_ppl] [--folder DIR]

`ctllm eval` with batches of 4,096 tokens, with batches of 1,000, and once more with 4,096, killed (SIGKILL) when a
third of the blocks of items is there, then taken up by the same command. Of the first two is compared item by item what
was picked, and by how much it was ahead: where that is under 1e-4, rounding may pick otherwise; such items are counted.
The killed one has to be the first again, to the byte; so has a fourth that finds all answers in the cache of the first.
"""

import argparse
import pathlib
import signal
import subprocess
import tempfile
import time

from common import CTLLM, finish, made, table

from ctllm_jax.common.files import read_jsonl
from ctllm_jax.evaluate.benchmark import HEADLINE, blocks
from ctllm_jax.evaluate.declarations import load_benchmark, load_task

CLOSE = 1e-4  # nats a token (or of the option, by the protocol), below which rounding may decide
BATCHES = (4096, 1000)  # tokens


def main() -> None:
    """Runs both and prints what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run directory or Hugging Face folder")
    parser.add_argument("--data", required=True, help="folder of benchmarks, as `ctllm eval --config.data` takes it")
    parser.add_argument("--tasks", nargs="+", default=["ceval_ppl", "cmmlu_ppl", "mmlu_ppl"])
    parser.add_argument("--folder", help="keeps everything; without it a temporary one, deleted at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(options.folder or scratch).resolve()
        settings = {"model": options.model, "data": options.data, "benchmarks": tuple(options.tasks)}
        first, second, again, known = (folder / name for name in ("whole", "other-batches", "killed", "known"))
        seconds = seconds_of(first, settings | {"batch_tokens": BATCHES[0]})
        made(second, "eval", settings | {"batch_tokens": BATCHES[1]})
        count = sum(len(list(blocks(load_benchmark(load_task(name), options.data), None))) for name in options.tasks)
        done = killed(again, settings | {"batch_tokens": BATCHES[0]}, count // 3)
        made(again, "eval", settings | {"batch_tokens": BATCHES[0]})
        seconds_known = seconds_of(known, settings | {"batch_tokens": BATCHES[0], "cache": first / "cache"})
        rows = [(name, *compare(name, first, second)) for name in options.tasks]
        files = [path.relative_to(first) for path in (first / "scores.json", *first.glob("parts/*/*.jsonl"))]
        changed, otherwise = (
            [str(file) for file in files if (first / file).read_bytes() != (other / file).read_bytes()]
            for other in (again, known)
        )
    heads = ("items", "picked otherwise", "of them close", "close in all", "largest difference of a margin")
    table(f"batches of {BATCHES[0]} and of {BATCHES[1]} tokens", ("", *heads), rows)
    print(f"killed after {done} of {count} blocks and taken up: {len(changed)} of {len(files)} files are not the same")
    print(
        f"all answers known: {len(otherwise)} of {len(files)} files are not the same; "
        f"{seconds_known:.1f} s instead of {seconds:.1f} s, both with Python's start"
    )
    items, other, excused = (sum(row[column] for row in rows) for column in (1, 2, 3))
    figures = {"repeat_items": items, "repeat_different": other - excused, "repeat_close": excused}
    changes = {"repeat_files_changed": len(changed), "repeat_known_files_changed": len(otherwise)}
    finish(figures | changes | {"repeat_s": seconds, "repeat_known_s": seconds_known})


def seconds_of(folder: pathlib.Path, settings: dict) -> float:
    """How long an evaluation takes; next to nothing where it is in the folder already."""
    clock = time.perf_counter()
    made(folder, "eval", settings)
    return time.perf_counter() - clock


def killed(folder: pathlib.Path, settings: dict, count: int) -> int:
    """Starts an evaluation and kills it once `count` blocks are done; how many there were."""
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    process = subprocess.Popen([*CTLLM, "eval", *flags, f"--workdir={folder}"])
    while (done := len(list(folder.glob("parts/*/*.jsonl")))) < count and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return done


def compare(name: str, *folders: pathlib.Path) -> tuple[int, int, int, int, float]:
    """(items, picked otherwise, of them close, close in all, largest difference of a margin) of a benchmark."""
    metric = HEADLINE[load_task(name).kind]
    logs = []
    for folder in folders:
        paths = sorted((folder / "parts" / name).glob("*.jsonl"))
        logs.append({(path.name, entry["id"]): entry for path in paths for entry in read_jsonl(path)})
    first, second = logs
    if first.keys() != second.keys():
        raise RuntimeError(f"{name}: {len(first.keys() ^ second.keys())} items are in one of the two only")
    picks = [(first[key]["picked"][metric], second[key]["picked"][metric]) for key in first]
    margins = [(first[key]["margins"][metric], second[key]["margins"][metric]) for key in first]
    close = [min(pair) < CLOSE for pair in margins]
    other = [one != another for one, another in picks]
    same = [abs(one - another) for (one, another), differs in zip(margins, other, strict=True) if not differs]
    excused = sum(a and b for a, b in zip(other, close, strict=True))
    return len(picks), sum(other), excused, sum(close), max(same)


if __name__ == "__main__":
    main()
