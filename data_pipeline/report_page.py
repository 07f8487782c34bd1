"""`report.html` of `ctllm corpus`: what was read, what went and why, and what it looks like."""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ctllm_jax.common import html
from data_pipeline.documents import SUBSETS
from data_pipeline.filters.measures import family
from data_pipeline.shards import CONTAMINATED, DUPLICATES
from data_pipeline.signals import bin_edge, bin_of

# % of raw Chinese Common Crawl that CT-LLM kept (arXiv 2404.04167, its figure of the pipeline), and our stage's name.
PAPER = (
    ("heuristic filters", 38, "language"),
    ("exact deduplication", 26, "exact dedup"),
    ("MinHash", 19, "near dedup"),
)
PAPER_LINES = ("similar lines", 15)
_SIZES = ("characters", "bytes", "similar_lines")
_BARS = 50  # of a histogram, at most
_TICKS = ((0, 1, 2, 5, *(10.0**e for e in range(1, 9))), tuple(number / 10 for number in range(11)))  # above 1, below


def page(found: Mapping[str, Any]) -> str:
    """The report as one HTML page, from what `report.collect` gives."""
    totals = found["totals"]
    lead = f"{totals['read']:,} records in {found['files']:,} shards of input; {totals['kept']:,} documents kept"
    return html.page("Corpus", lead, list(sections(found).items()))


def sections(found: Mapping[str, Any]) -> dict[str, str]:
    """The page's parts as HTML by their headings."""
    totals = found["totals"]
    cards = html.cards(
        {
            "records read": totals["read"],
            "documents kept": totals["kept"],
            "characters kept": totals["characters"],
            "rejected by filters": totals["well_formed"] - totals["passed_language"],
            "duplicates": sum(totals[name] for name in DUPLICATES),
            "malformed records": totals["read"] - totals["well_formed"],
        }
    )
    parts = {
        "Overview": cards + _file_notes(found),
        "Funnel": _funnel(found) + _beside_the_paper(found),
        "Why documents were rejected": _reasons(found),
        "Signals": _signals(found),
        "Kept documents": _kept(found),
        "Rejected documents": _rejected(found),
        "Duplicates": _duplicates(found),
    }
    return parts | ({"Benchmarks": _benchmarks(found["benchmarks"])} if found["benchmarks"] else {})


def _file_notes(found: Mapping[str, Any]) -> str:
    notes = [html.paragraph(f"{e['file']} is damaged: {e['damage']}", "bad") for e in found["damaged_files"]]
    notes += [html.paragraph(f"{path} holds no record", "soft") for path in found["empty_files"]]
    return "".join(notes)


def _funnel(found: Mapping[str, Any]) -> str:
    rows = [
        [name, *(count for _, count in values["funnel"]), *(values[size] for size in _SIZES)]
        for name, values in {**found["subsets"], "all": found["totals"]}.items()
    ]
    stages = [stage for stage, _ in found["totals"]["funnel"]]
    masked = ", ".join(f"{count:,} {kind}" for kind, count in found["totals"]["masked"].items())
    return (
        html.paragraph("Documents left after each stage, then what is kept.", "soft")
        + (html.paragraph(f"Masked in documents that passed the filters: {masked}.") if masked else "")
        + html.table(["subset", *stages, "characters", "bytes", "similar lines dropped"], rows)
    )


def _beside_the_paper(found: Mapping[str, Any]) -> str:
    """The share of Chinese documents that is left after each stage that the paper has, too."""
    chinese = [name for name in SUBSETS if name in found["subsets"] and family(name) == "chinese"]
    ours = {name: dict(found["subsets"][name]["funnel"]) for name in chinese}
    if not ours:
        return ""
    stages = ["read", *(stage for _, _, stage in PAPER)]
    everything = {stage: sum(funnel[stage] for funnel in ours.values()) for stage in stages}
    columns = {**ours, "all Chinese": everything} if len(ours) > 1 else ours
    rows = [
        [f"after {name}", paper, *(round(100 * funnel[stage] / funnel["read"], 1) for funnel in columns.values())]
        for name, paper, stage in PAPER
    ]
    rows.append([f"after {PAPER_LINES[0]}", PAPER_LINES[1], *(None for _ in columns)])
    note = (
        "Beside CT-LLM's funnel, in % of what was read. Its input is raw Chinese Common Crawl; of documents that were "
        "filtered before, more is left. Similar lines cost documents sentences here, and no document goes."
    )
    return html.heading("Beside the paper") + html.paragraph(note, "soft") + html.table(["", "CT-LLM", *columns], rows)


def _reasons(found: Mapping[str, Any]) -> str:
    totals = found["totals"]
    reasons = {**totals["malformed"], **totals["rules"]}
    reasons |= {name: totals[name] for name in (*DUPLICATES, CONTAMINATED) if totals[name]}
    note = html.paragraph("A document that breaks several rules counts for each of them.", "soft")
    bars = dict(sorted(reasons.items(), key=lambda item: -item[1]))
    return note + html.bar_chart("Rejections by reason", bars)


# ---- Signals


def _signals(found: Mapping[str, Any]) -> str:
    note = html.paragraph(
        "All well-formed documents, before any was rejected. Red is beyond a limit; heights grow with the square root "
        "of the number, and the axis is logarithmic above 1. Measures without a limit are only recorded.",
        "soft",
    )
    by_size = sorted(found["histograms"], key=lambda subset: -found["subsets"][subset]["well_formed"])
    parts = [html.heading(by_size[0]) + html.charts(*histograms(found, by_size[0]))] if by_size else []
    parts += [html.details(subset, html.charts(*histograms(found, subset))) for subset in by_size[1:]]
    return note + "".join(parts)


def histograms(found: Mapping[str, Any], subset: str, *measures: str) -> Iterator[str]:
    """One chart for each measure, or each of some; those with limits first."""
    limits, values = found["limits"].get(subset, {}), found["subsets"][subset]
    for name in measures or sorted(found["histograms"][subset], key=lambda name: name not in limits):
        own = limits.get(name, {})
        bounds = ", ".join(f"{bound} {limit:g}" for bound, limit in own.items())
        beyond = values["rules"].get(name, 0) / values["well_formed"]
        bins = {int(number): count for number, count in found["histograms"][subset][name].items()}
        yield _chart(f"{name} ({bounds}): {beyond:.2%} beyond" if own else name, bins, own)


def _chart(title: str, bins: Mapping[int, int], limits: Mapping[str, float]) -> str:
    """A histogram; what lies below 1 takes less room where most lies above."""
    room = 1 if max(bins, default=0) <= bin_of(1) else 0.1

    def place(number: float) -> float:
        return number * room if number <= bin_of(1) else bin_of(1) * room + number - bin_of(1)

    bars: dict[int, list] = {}
    width = max(1, math.ceil(place(max(bins, default=0)) / _BARS))
    for number, count in sorted(bins.items()):
        middle = bin_edge(number + 0.5)
        beyond = middle > limits.get("max", math.inf) or middle < max(limits.get("min", 0), limits.get("above", 0))
        bar = bars.setdefault(int(place(number) / width), [0, 0])
        bar[0], bar[1] = bar[0] + count, bar[1] + count * beyond
    drawn = [(b * width, (b + 1) * width, count, red > count / 2) for b, (count, red) in bars.items()]
    low, high = (min(bars) * width, (max(bars) + 1) * width) if bars else (0, 0)
    marks = {f"{bound} {limit:g}": place(bin_of(limit)) for bound, limit in limits.items()}
    inside = {name: where for name, where in marks.items() if low <= where <= high}
    return html.histogram(title, drawn, inside, {f"{tick:g}": place(bin_of(tick)) for tick in _TICKS[room == 1]})


# ---- Samples


def _kept(found: Mapping[str, Any]) -> str:
    parts = []
    for subset, samples in found["samples"].items():
        shown = "".join(
            html.paragraph(" ".join(filter(None, (sample["id"], sample["url"]))), "soft")
            + html.quote(sample["excerpt"])
            for sample in samples
        )
        parts.append(html.details(f"{subset} ({found['subsets'][subset]['kept']:,} documents)", shown))
    return html.paragraph("Some of each subset, chosen by the hash of their ids.", "soft") + "".join(parts)


def _rejected(found: Mapping[str, Any]) -> str:
    parts = []
    for rule, examples in found["examples"].items():
        shown = "".join(
            html.paragraph(_because(example), "soft") + html.quote(example["excerpt"]) for example in examples
        )
        parts.append(html.details(rule, shown))
    return "".join(parts) or html.paragraph("Nothing was rejected.")


def _because(example: Mapping[str, Any]) -> str:
    if example.get("kind") == "id":
        return f"{example['id']} was there before, with another text or the same"
    if "duplicate_of" in example:
        return f"{example['id']} repeats {example['duplicate_of']} (similarity {example['similarity']:.2f})"
    if example.get("rule") == CONTAMINATED:
        return f"{example['id']} holds {example['value']:.0%} of {example['task']} {example['item']}"
    if "threshold" in example:
        return f"{example['id']}: {example['value']} ({example['bound']} {example['threshold']})"
    return f"{example['id']}: {example['value']}"


# ---- Duplicates


def _duplicates(found: Mapping[str, Any]) -> str:
    if not found["duplicates"]:
        return html.paragraph("There are none, or they repeat an earlier corpus.", "soft")
    note = (
        "What stays (left) and what repeats it, from shortly before the first difference on: clusters with the least "
        "similar copies, then exact ones. Marked is what the first copy changes, and what each copy has of its own."
    )
    return html.paragraph(note, "soft") + "".join(map(_cluster, found["duplicates"]))


def _cluster(cluster: Mapping[str, Any]) -> str:
    first, copies = cluster["first"], cluster["copies"]
    columns = [(f"{first['id']}: stays", _diff(first["excerpt"], copies[0]["excerpt"]))]
    for copy in copies:
        heading = f"{copy['id']}: {cluster['kind']} duplicate, similarity {copy['similarity']:.2f}"
        columns.append((heading, _diff(copy["excerpt"], first["excerpt"])))
    return html.side_by_side(columns)


def _diff(text: str, other: str) -> list[tuple[str, bool]]:
    """A text in pieces, with whether each is missing in another."""
    blocks = difflib.SequenceMatcher(None, other, text, autojunk=False).get_opcodes()
    return [(text[begin:end], kind != "equal") for kind, _, _, begin, end in blocks]


def _benchmarks(seen: Mapping[str, Any]) -> str:
    rows = [
        [task, entry["items"], entry["too_short"], entry["seen"], entry["documents"]]
        for task, entry in seen["tasks"].items()
    ]
    note = f"{seen['documents']:,} documents held items of benchmarks and were left out; hits.jsonl lists every hit."
    return html.paragraph(note) + html.table(["benchmark", "items", "too short to find", "seen", "in documents"], rows)
