"""A run on real documents: from raw files to a model of 6.8 M parameters, its curves and samples, and a small sweep.

    python benchmarks/real_run.py --input 'raw/*.jsonl.gz' [--steps 2000] [--rows 32] [--data BENCHMARKS]
        [--sweep-steps N] [--folder DIR]

The documents, with the sample's English and code, go through `ctllm corpus`, `tokenizer` (8,192 pieces) and `tokenize`
(rows of 512). The model is configs/pretrain.py:tiny with 6 layers of width 256; bf16 and our kernels on an accelerator,
fp32 in plain JAX on a CPU. The sweep sees the same number of tokens with other learning rates and batches. With --data
every checkpoint of the run answers benchmarks, and `ctllm table` draws the curve. Every stage and run is a folder below
--folder; what is finished there is not done again, what was cut short goes on.
"""

import argparse
import pathlib
import statistics
import subprocess
import tempfile

import jax
from common import CTLLM, finish, made, table

from ctllm_jax.common.files import read_json, read_jsonl
from ctllm_jax.data.store import open_store
from ctllm_jax.metrics.log import read_metrics

SAMPLE = pathlib.Path(__file__).resolve().parent.parent / "sample" / "documents"
RATE = 3e-3
SWEEP = ((1, 1e-3), (1, 6e-3), (1, 1.2e-2), (0.5, RATE), (2, RATE))  # (batch over that of the run, peak learning rate)
KERNELS = {"cpu": ("float32", "xla"), "gpu": ("bfloat16", "pallas_gpu"), "tpu": ("bfloat16", "pallas_tpu")}
LOOKS = 8  # at held-out data, after the first; each has a checkpoint
TASKS = ("eprstmt_ppl", "bustm_ppl", "cluewsc_ppl", "csl_ppl", "xcopa_zh_ppl", "chid_ppl", "piqa_ppl", "obqa_ppl")
LIMIT = 300  # items of each benchmark


def main() -> None:
    """Makes what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="globs of documents (jsonl or jsonl.gz)")
    parser.add_argument("--steps", type=int, default=2000, help="of the run")
    parser.add_argument("--rows", type=int, default=32, help="of 512 tokens in a batch of the run")
    parser.add_argument(
        "--sweep-steps", type=int, help="as many batches' tokens for each run of the sweep; 0: no sweep"
    )
    parser.add_argument(
        "--data", help="folder of benchmarks, as `ctllm eval --config.data` takes it; without it no curve"
    )
    parser.add_argument("--folder", help="keeps everything; without it a temporary one, deleted at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(options.folder or scratch).resolve()
        store = store_of(options.input, folder)
        run = trained(folder, store, options.steps, options.rows, options.rows, RATE)
        figures = show(run, store)
        if options.data:
            curve(folder, run, options.data)
        steps = options.steps if options.sweep_steps is None else options.sweep_steps
        if steps:
            settings = [(max(1, int(options.rows * factor)), rate) for factor, rate in ((1, RATE), *SWEEP)]
            runs = [trained(folder, store, steps, options.rows, batch, rate) for batch, rate in settings]
            figures |= show_sweep(runs, settings)
    finish(figures | {"steps": options.steps, "device": jax.devices()[0].device_kind})


def store_of(patterns: list[str], folder: pathlib.Path) -> pathlib.Path:
    """The documents as a token store."""
    sources = (*patterns, str(SAMPLE / "en.jsonl"), str(SAMPLE / "code.jsonl"))
    corpus = made(folder / "corpus", "corpus", {"input": sources})
    tokenizer = made(folder / "tokenizer", "tokenizer", {"corpus": corpus, "vocab_size": 8192})
    packed = {"corpus": corpus, "tokenizer": tokenizer, "sequence_length": 512, "validation_share": 0.03}
    return made(folder / "store", "tokenize", packed)


def trained(folder: pathlib.Path, store: pathlib.Path, steps: int, rows: int, batch: int, rate: float) -> pathlib.Path:
    """A run with this batch of as many tokens as `steps` batches of `rows` rows."""
    steps = steps * rows // batch
    dtype, attention = KERNELS[jax.default_backend()]
    shape = dict(num_layers=6, d_model=256, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=688, tie_embeddings=True)
    shape |= dict(vocab_size=8192, padded_vocab_size=8192, max_length=512, dtype=dtype, attention=attention)
    settings = {f"model.{name}": value for name, value in shape.items()}
    settings |= {"optimizer.learning_rate": rate, "optimizer.final_learning_rate": 1e-4, "optimizer.warmup": "5%"}
    settings |= {"data.store": store, "batch_size": batch, "duration": f"{steps} steps"}
    settings |= {"eval.every": max(1, steps // LOOKS), "eval.batches": 20, "checkpoints.every": max(1, steps // LOOKS)}
    settings |= {"checkpoints.kept": LOOKS}
    return made(folder / f"run-{batch}-{rate:g}-{steps}", "train", settings, "configs/pretrain.py:tiny")


def show(run: pathlib.Path, store_folder: pathlib.Path) -> dict:
    """Prints a run's curve, its speed and its samples."""
    store, looks, steps = open_store(store_folder), read_metrics(run, "eval"), read_metrics(run, "train")
    names = [name for name in looks[-1] if name.startswith(("bits_per_byte/", "accuracy/"))]
    manifest = read_json(run / "manifest.json")
    learned = sum(entry["learned"] for entry in store.info["splits"]["train"].values())
    speeds = [entry["tokens_per_second"] for entry in steps if "tokens_per_second" in entry]
    speed = f"{statistics.median(speeds):,.0f} tokens/s (median), " if speeds else ""  # a trial is too short for it
    norms = max(entry["grad_norm"] for entry in steps)
    table(
        f"{run.name}: {manifest['result']['parameters']:,} parameters, a store of {learned:,} tokens to learn",
        ("step", "loss", *names),
        [(str(look["step"]), look["loss"], *(look[name] for name in names)) for look in looks],
    )
    print(
        f"{speed}{manifest['seconds']:,.0f} s in all; "
        f"{manifest['result']['skipped']} steps skipped, largest gradient norm {norms:.1f}"
    )
    samples = [entry for entry in read_jsonl(run / "samples.jsonl") if entry["step"] == looks[-1]["step"]]
    print(*(f"{entry['prompt']!r} -> {entry['text']!r}" for entry in samples), sep="\n")
    return {"loss": looks[-1]["loss"], **{name: looks[-1][name] for name in names}}


def curve(folder: pathlib.Path, run: pathlib.Path, data: str) -> None:
    """Scores every checkpoint of a run; prints the table and draws it into FOLDER/curve-RUN."""
    settings = {"benchmarks": TASKS, "data": data, "limit": LIMIT}
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    scored = [
        made(folder / f"eval-{run.name}-{step}", "eval", {"model": run, "step": step, **settings}) for step in steps
    ]
    print(flush=True)
    drawn = folder / f"curve-{run.name}"
    subprocess.run([*CTLLM, "table", *map(str, scored), "--reported=checkpoints", f"--workdir={drawn}"], check=True)


def show_sweep(runs: list[pathlib.Path], settings: list[tuple[int, float]]) -> dict:
    """Prints the loss that each run ended with."""
    losses = [read_metrics(run, "eval")[-1]["loss"] for run in runs]
    rows = sorted((batch, rate, loss) for (batch, rate), loss in zip(settings, losses, strict=True))
    table("sweep, the same number of tokens each", ("batch", "learning rate", "held-out loss"), rows)
    return {"sweep": {f"{batch}, {rate:g}": loss for batch, rate, loss in rows}}


if __name__ == "__main__":
    main()
