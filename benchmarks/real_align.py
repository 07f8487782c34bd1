"""Alignment on real data: the model of real_run.py through SFT at two ratios of languages, and DPO, scored on the way.

    python benchmarks/real_align.py --folder REAL --run RUN --data BENCHMARKS --chats-zh 'zh/*.json.gz'
        --chats-en 'en/*.json.gz' --pairs-zh 'pairs_zh.json.gz' --pairs-en 'pairs_en.json.gz' [--ratios 1:1 8:1]

REAL is the folder of real_run.py, RUN the run in it to start from. Conversations and pairs are what `ctllm tokenize`
reads; they get their language from the option that names them. A store of all conversations, which nothing trains on,
holds out what those of the ratios hold out, so that every model is asked the same; so does the store of the documents.
Every stage is a folder below REAL/align: what is finished there is not done again.
"""

import argparse
import pathlib
from collections.abc import Sequence

from common import finish, made, table

from ctllm_jax.common.files import expand, read_jsonl, write_jsonl
from ctllm_jax.common.manifest import read_result
from ctllm_jax.metrics.log import read_metrics
from data_pipeline.formats import Unusable, normalise
from data_pipeline.records import entries

TASKS = ("eprstmt_ppl", "cluewsc_ppl", "csl_ppl", "c3_m_ppl", "xcopa_zh_ppl", "piqa_ppl", "obqa_ppl")
LIMIT = 300  # items of each benchmark
QUESTIONS = ("给我三个保持健康的建议。", "写一首关于春天的短诗。", "Give three tips for staying healthy.")
PREFERENCE = ("accuracy", "margin", "reward_chosen", "reward_rejected")  # metrics of DPO
LENGTH = 512  # of real_run.py's rows
HELD_OUT = 0.1  # of conversations and of pairs


def main() -> None:
    """Makes what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="of real_run.py")
    parser.add_argument("--run", required=True, help="name of a run in it")
    parser.add_argument("--data", required=True, help="folder of benchmarks, as `ctllm eval --config.data` takes it")
    for kind in ("chats", "pairs"):
        for language in ("zh", "en"):
            parser.add_argument(f"--{kind}-{language}", nargs="+", required=True, help="globs of records")
    parser.add_argument("--ratios", nargs="+", default=["1:1", "8:1"], help="of configs/mixtures.py")
    options = parser.parse_args()
    real = pathlib.Path(options.folder).resolve()
    folder, base = real / "align", real / options.run
    chats = labelled(folder / "chats.jsonl", {"zh": options.chats_zh, "en": options.chats_en})
    pairs = labelled(folder / "pairs.jsonl", {"zh": options.pairs_zh, "en": options.pairs_en})
    everything = store_of(folder / "store-chat", "chat", chats, real)
    preferences = store_of(folder / "store-preference", "preference", pairs, real)
    models, runs = {"base": base}, {}
    for ratio in options.ratios:
        name = ratio.replace(":", "to")
        store = store_of(folder / f"store-chat-{name}", f"chat@{ratio}", chats, real)
        sft = trained(folder / f"sft-{name}", "sft", store, base, "2 epochs")
        dpo = trained(folder / f"dpo-{name}", "dpo", preferences, sft, "2 epochs")
        runs |= {f"SFT {ratio}": sft, f"DPO after {ratio}": dpo}
        models |= {f"SFT {ratio}": sft, f"SFT {ratio}, DPO": dpo}
    scored = {name: scores(folder, model, real / "store", everything, options.data) for name, model in models.items()}
    show_runs(runs)
    show_scores(scored)
    show_samples({name: folder / f"eval-{model.name}" for name, model in models.items()})
    finish({name: chat["total"]["nats_per_token"] for name, (_, chat) in scored.items()})


def labelled(path: pathlib.Path, patterns: dict[str, Sequence[str]]) -> pathlib.Path:
    """The records that are in a known format, in one file, each with its language; written unless it is there."""
    if path.exists():
        return path
    found, unknown = [], 0
    for language, globs in patterns.items():
        for file in expand(globs):
            for number, entry in entries(file):
                try:
                    bodies = normalise(entry)
                except Unusable:
                    unknown += 1
                    continue
                name = f"{pathlib.Path(file).name}:{number}"
                found += [{"id": f"{name}:{i}", "language": language, **body} for i, body in enumerate(bodies)]
    print(f"{path.name}: {len(found):,} records, {unknown:,} in no known format")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, found)
    return path


def store_of(folder: pathlib.Path, kind: str, records: pathlib.Path, real: pathlib.Path) -> pathlib.Path:
    """The records as a token store, in rows as long as those of the documents."""
    settings = {"input": records, "tokenizer": real / "tokenizer", "sequence_length": LENGTH}
    settings |= {"validation_share": HELD_OUT}
    return made(folder, "tokenize", settings, f"configs/tokenize.py:{kind}")


def trained(folder: pathlib.Path, stage: str, store: pathlib.Path, origin: pathlib.Path, duration: str) -> pathlib.Path:
    """A run of configs/STAGE.py:tiny on all of a store."""
    settings = {"init_from": origin, "data.store": store, "duration": duration, "optimizer.warmup": "10%"}
    settings |= {"eval.every": 20, "eval.batches": 8, "eval.prompts": (), "checkpoints.every": 40}
    return made(folder, "train", settings, f"configs/{stage}.py:tiny")


def scores(
    folder: pathlib.Path, model: pathlib.Path, documents: pathlib.Path, chats: pathlib.Path, data: str
) -> tuple[dict, dict]:
    """What `ctllm eval` says of a model: on documents and benchmarks, with answers; on held-out conversations."""
    settings = {"model": model, "perplexity.store": documents, "benchmarks": TASKS, "data": data, "limit": LIMIT}
    settings |= {"prompts": QUESTIONS, "chat": True, "sampling.max_tokens": 64}
    whole = made(folder / f"eval-{model.name}", "eval", settings)
    settings = {"model": model, "perplexity.store": chats}
    chat = made(folder / f"eval-chat-{model.name}", "eval", settings)
    return read_result(whole, "eval")[1], read_result(chat, "eval")[1]["perplexity"]


def show_runs(runs: dict[str, pathlib.Path]) -> None:
    """Prints what held-out data said before and after each run; chance is a preference accuracy of 0.5."""
    rows = []
    for name, run in runs.items():
        looks = read_metrics(run, "eval")
        for look in (looks[0], looks[-1]):
            told = [look.get(metric, "-") for metric in ("loss", *PREFERENCE)]
            rows.append((f"{name}, step {look['step']}", *told))
    table("held-out data of each run", ("", "loss", *PREFERENCE), rows)


def show_scores(scored: dict[str, tuple[dict, dict]]) -> None:
    """Prints a line for each model: bits per byte of documents, nats per token of answers, benchmarks in per cent."""
    (first, chat), *_ = scored.values()
    documents = [source for source in first["perplexity"] if source != "total"]
    languages = [language for language in chat if language != "total"]
    rows = []
    for name, (whole, chat) in scored.items():
        bits = [whole["perplexity"][source]["bits_per_byte"] for source in documents]
        nats = [chat[language]["nats_per_token"] for language in languages]
        rows.append((name, *bits, *nats))
    heads = [f"bits/byte {source}" for source in documents] + [f"nats/token {name}" for name in languages]
    table("held-out documents, and answers of held-out conversations", ("", *heads), rows)
    rows = [(name, *(_percent(whole["benchmarks"][task]) for task in TASKS)) for name, (whole, _) in scored.items()]
    rows.append(("chance", *(f"{100 * first['benchmarks'][task]['chance']:.1f}" for task in TASKS)))
    table(f"benchmarks, per cent +- standard error, at most {LIMIT} items of a subset", ("", *TASKS), rows)


def _percent(found: dict) -> str:
    score = found["scores"][found["headline"]]["micro"]
    return f"{100 * score['mean']:.1f} +- {100 * score['stderr']:.1f}"


def show_samples(folders: dict[str, pathlib.Path]) -> None:
    """Prints what each model answers, greedily."""
    for name, folder in folders.items():
        print(f"\n{name}")
        for entry in read_jsonl(folder / "samples.jsonl"):
            print(f"  {entry['prompt']!r} -> {entry['text']!r}")


if __name__ == "__main__":
    main()
