"""The quickstart's summary and page. Every number is read from what the stages of this very run wrote."""

import pathlib
import statistics

from ctllm_jax.common import html
from ctllm_jax.common.files import read_json, read_jsonl
from ctllm_jax.metrics import read_metrics

RUNS = {"pretrain": "Pretraining", "sft": "SFT", "dpo": "DPO"}
NORMS = ("sum", "characters", "bytes", "tokens")  # what a choice's log-likelihood is divided by
CURVES = ("step", "loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "bits_per_byte")


def collect(out: str, stages: list[str]) -> dict:
    """All figures of a finished quickstart as one JSON-able value."""
    root = pathlib.Path(out)
    manifests = {stage: read_json(root / stage / "manifest.json") for stage in stages}
    evaluations = [name for name in ("pretrain", "sft", "dpo", "huggingface")]
    summary = {
        "corpus": read_json(root / "corpus" / "report.json"),
        "tokenizer": manifests["tokenizer"]["result"],
        "stores": {name: manifests[f"store/{name}"]["result"]["splits"] for name in ("pretrain", "sft", "preference")},
        "training": {name: _training(root / "train" / name) for name in RUNS},
        "scores": {name: manifests[f"eval/{name}"]["result"] for name in evaluations},
        "samples": {
            name: read_jsonl(root / "eval" / name / "samples.jsonl") for name in (*evaluations, "pretrain-chat")
        },
        "seconds": {stage: manifest["seconds"] for stage, manifest in manifests.items()},
    }
    summary["checks"] = _checks(summary)
    return summary


def _training(folder: pathlib.Path) -> dict:
    def curve(kind: str) -> list[dict]:
        return [{key: entry[key] for key in CURVES if key in entry} for entry in read_metrics(folder, kind)]

    run = read_json(folder / "run.json")
    speeds = [e["tokens_per_second"] for e in read_metrics(folder, "train") if "tokens_per_second" in e]
    return {
        "parameters": run["parameters"],
        "devices": run["devices"],
        "versions": run["versions"],
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "train": curve("train"),
        "held_out": curve("eval"),
    }


def _checks(summary: dict) -> list[dict]:
    """What the run is expected to show, and whether it does."""
    held = {name: run["held_out"] for name, run in summary["training"].items()}
    total = summary["scores"]["pretrain"]["perplexity"]["total"]
    exported, aligned = summary["scores"]["huggingface"], summary["scores"]["dpo"]
    difference = abs(exported["perplexity"]["total"]["bits_per_byte"] - aligned["perplexity"]["total"]["bits_per_byte"])
    rows = [
        (
            "Pretraining: held-out bits per byte are below a unigram model's",
            f"{total['bits_per_byte']:.3f} against {total['unigram_bits_per_byte']:.3f}",
            total["bits_per_byte"] < total["unigram_bits_per_byte"],
        ),
        (
            "SFT: held-out loss on the assistant's tokens falls",
            f"{held['sft'][0]['loss']:.3f} to {held['sft'][-1]['loss']:.3f} nats per token",
            held["sft"][-1]["loss"] < held["sft"][0]["loss"],
        ),
        (
            "DPO: the held-out margin between chosen and rejected rises",
            f"{held['dpo'][0]['margin']:.3f} to {held['dpo'][-1]['margin']:.3f}",
            held["dpo"][-1]["margin"] > held["dpo"][0]["margin"],
        ),
        (
            "DPO: chosen answers win on more than half of the held-out pairs",
            f"{held['dpo'][-1]['accuracy']:.3f}",
            held["dpo"][-1]["accuracy"] > 0.5,
        ),
        (
            "Export: the Hugging Face folder scores and answers as the checkpoint does",
            f"bits per byte differ by {difference:.1e}",
            difference < 1e-5 and summary["samples"]["huggingface"] == summary["samples"]["dpo"],
        ),
    ]
    return [{"claim": claim, "value": value, "holds": bool(holds)} for claim, value, holds in rows]


def table(summary: dict) -> str:
    """The summary for a terminal."""
    totals = summary["corpus"]["totals"]
    lines = [
        "",
        f"documents   {totals['read']:,} read, {totals['kept']:,} kept",
        f"parameters  {summary['training']['pretrain']['parameters']:,}",
        f"time        {sum(summary['seconds'].values()):.0f} s",
        "",
    ]
    lines += [
        f"{'yes' if check['holds'] else 'NO ':<4} {check['claim']}: {check['value']}" for check in summary["checks"]
    ]
    lines += ["", f"{'model':<14}{'bits/byte':>11}{'choice (sum)':>15}{'+-':>8}"]
    for name, scores in summary["scores"].items():
        figure = f"{name:<14}{scores['perplexity']['total']['bits_per_byte']:>11.4f}"
        for task in scores["benchmarks"].values():
            micro = task["scores"]["sum"]["micro"]
            figure += f"{micro['mean']:>15.3f}{micro['stderr']:>8.3f}"
        lines.append(figure)
    return "\n".join(lines)


def page(summary: dict) -> str:
    """The report as one self-contained page."""
    totals, training = summary["corpus"]["totals"], summary["training"]
    total = summary["scores"]["pretrain"]["perplexity"]["total"]
    cards = html.cards(
        {
            "documents read": totals["read"],
            "documents kept": totals["kept"],
            "training tokens": sum(source["tokens"] for source in summary["stores"]["pretrain"]["train"].values()),
            "parameters": training["pretrain"]["parameters"],
            "held-out bits per byte": round(total["bits_per_byte"], 3),
            "unigram bits per byte": round(total["unigram_bits_per_byte"], 3),
            "seconds in all": round(sum(summary["seconds"].values())),
        }
    )
    checks = html.table(
        ["", "what the run should show", "what it shows"],
        [
            [
                html.raw('<span class="good">yes</span>' if check["holds"] else '<span class="bad">no</span>'),
                check["claim"],
                check["value"],
            ]
            for check in summary["checks"]
        ],
    )
    run = training["pretrain"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return html.page(
        "ctllm-jax quickstart",
        f"From raw documents to an aligned model, on {run['devices']}. {versions}.",
        [
            ("In short", cards + checks),
            ("Corpus", _corpus(summary["corpus"])),
            ("Tokenizer and stores", _tokens(summary)),
            ("Training", _curves(training)),
            ("Scores", _scores(summary["scores"])),
            ("Samples", _samples(summary["samples"])),
            ("Time", _times(summary)),
        ],
    )


def _corpus(corpus: dict) -> str:
    funnel = [step for step, _ in corpus["totals"]["funnel"]]
    rows = [
        [name, *(count for _, count in values["funnel"]), values["characters"]]
        for name, values in {**corpus["subsets"], "all": corpus["totals"]}.items()
    ]
    notes = [html.paragraph(f"{e['file']} is damaged: {e['damage']}", "bad") for e in corpus["damaged_files"]]
    notes += [html.paragraph(f"{file} holds no record", "bad") for file in corpus["empty_files"]]
    reasons = {**corpus["totals"]["malformed"], **corpus["totals"]["rules"]}
    reasons |= {f"duplicate_{step}": corpus["totals"][f"duplicate_{step}"] for step in ("id", "exact", "near")}
    reasons = dict(sorted(((name, n) for name, n in reasons.items() if n), key=lambda item: -item[1]))
    rows_of_reasons = [[name, count, *_example(corpus["examples"].get(name, []))] for name, count in reasons.items()]
    return (
        html.paragraph("Documents left after each stage, and characters kept.", "soft")
        + html.table(["subset", *funnel, "characters"], rows)
        + "".join(notes)
        + html.heading("Why documents were rejected")
        + html.paragraph("A document that breaks several rules counts for each of them. Click for the text.", "soft")
        + html.table(["reason", "documents", "for example", "measured", "text"], rows_of_reasons)
    )


def _example(found: list[dict]) -> tuple:
    """(id, what was measured, excerpt) of a reason's first example."""
    if not found:
        return (None, None, None)
    example = found[0]
    if "duplicate_of" in example:
        alike = example.get("similarity")  # None for two documents that only share an id
        measured = f"repeats {example['duplicate_of']}" + (f", similarity {alike:.2f}" if alike else "")
    elif "threshold" in example:
        measured = f"{example['value']} ({example['bound']} {example['threshold']})"
    else:
        measured = example.get("value", "")
    return (
        example["id"],
        measured,
        html.raw(html.details(example["excerpt"][:24] + "…", html.quote(example["excerpt"]))),
    )


def _tokens(summary: dict) -> str:
    names = (
        "documents",
        "characters",
        "tokens",
        "characters_per_token",
        "bytes_per_token",
        "round_trip_failures",
    )
    fertility = [[subset, *(entry[n] for n in names)] for subset, entry in summary["tokenizer"]["subsets"].items()]
    stores = [
        [
            name,
            split,
            source,
            *(entry[key] for key in ("documents", "rows", "tokens", "truncated", "dropped")),
        ]
        for name, splits in summary["stores"].items()
        for split, sources in splits.items()
        for source, entry in sources.items()
    ]
    return (
        html.paragraph(f"SentencePiece BPE with {summary['tokenizer']['vocab_size']:,} pieces.")
        + html.table(["subset", *(name.replace("_", " ") for name in names)], fertility)
        + html.details(
            "Token stores, source by source",
            html.table(["store", "split", "source", "documents", "rows", "tokens", "truncated", "dropped"], stores),
        )
    )


def _curves(training: dict) -> str:
    def points(entries: list[dict], key: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[key]) for entry in entries if key in entry]

    losses = [
        html.line_chart(
            f"{title}: loss",
            {
                "train": points(training[name]["train"], "loss"),
                "held out": points(training[name]["held_out"], "loss"),
            },
            "step",
        )
        for name, title in RUNS.items()
    ]
    dpo = training["dpo"]["held_out"]
    rewards = html.line_chart(
        "DPO, held out: rewards and margin",
        {
            name: points(dpo, key)
            for name, key in (
                ("chosen", "reward_chosen"),
                ("rejected", "reward_rejected"),
                ("margin", "margin"),
            )
        },
        "step",
        {"start": 0.0},
    )
    rows = [
        [title, training[name]["train"][-1]["step"], training[name]["tokens_per_second"]]
        for name, title in RUNS.items()
    ]
    return html.charts(*losses, rewards) + html.table(["stage", "steps", "tokens per second (median)"], rows)


def _scores(scores: dict) -> str:
    sources = list(scores["pretrain"]["perplexity"])
    perplexity = [
        [
            name,
            *(
                scores["pretrain"]["perplexity"][source]["unigram_bits_per_byte"]
                if name == "unigram"
                else scores[name]["perplexity"][source]["bits_per_byte"]
                for source in sources
            ),
        ]
        for name in ("unigram", *scores)
    ]
    choice = [
        [
            name,
            task,
            entry["questions"],
            *(f"{v['mean']:.3f} ± {v['stderr']:.3f}" for v in (entry["scores"][norm]["micro"] for norm in NORMS)),
        ]
        for name, result in scores.items()
        for task, entry in result["benchmarks"].items()
    ]
    return (
        html.heading("Held-out bits per byte")
        + html.table(["model", *sources], perplexity)
        + html.heading("Multiple choice: accuracy ± standard error, by what the log-likelihood is divided by")
        + html.paragraph(
            "Four options: guessing gives 0.25. A model this small knows little; the figures say how little.",
            "soft",
        )
        + html.table(["model", "task", "questions", *NORMS], choice)
    )


def _samples(samples: dict) -> str:
    base = html.table(["prompt", "continuation"], [[s["prompt"], s["text"]] for s in samples["pretrain"]])
    asked = [
        [before["prompt"], before["text"], after["text"], aligned["text"]]
        for before, after, aligned in zip(samples["pretrain-chat"], samples["sft"], samples["dpo"], strict=True)
    ]
    return (
        html.heading("The base model continues")
        + base
        + html.heading("Questions before and after alignment (greedy)")
        + html.table(["question", "base model", "after SFT", "after DPO"], asked)
    )


def _times(summary: dict) -> str:
    return html.table(["stage", "seconds"], [[name, seconds] for name, seconds in summary["seconds"].items()])
