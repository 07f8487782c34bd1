"""The page of `ctllm report`: tables and curves of one run, or of several over one another."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ctllm_jax.common import html
from ctllm_jax.metrics.definitions import METRICS, find
from ctllm_jax.metrics.goodput import ACCOUNTS
from ctllm_jax.metrics.run_record import RunRecord

Curve = list[tuple[float, float]]

_MOST = 600  # points of a curve on the page
_SPEED = ("tokens_per_second", "mfu_causal", "mfu_full", "step_ms", "input_wait_ms")
_MEMORY = ("device_memory_peak_gib", "host_memory_gib")
# No curves: where a line belongs, what is told in a table, what hardly changes.
_SKIPPED = {"kind", "step", "time", "count", "tokens", "skipped", "evaluation_seconds"}
_LOGARITHMIC = {"loss", "bits_per_byte", "grad_norm", "update_norm", "param_norm"}


def page(runs: Sequence[RunRecord], smooth: float) -> str:
    """The whole page; `smooth` is the share of a training curve that its means reach over."""
    one = runs[0] if len(runs) == 1 else None
    lead = "Curves of training runs, as far as they have got."
    if one and one.about:
        versions = ", ".join(f"{name} {version}" for name, version in one.about["versions"].items())
        lead = f"{one.about['parameters']:,} parameters on {one.about['devices']}. {versions}."
    title = one.name if one else ", ".join(run.name for run in runs)
    return html.page(title, lead, list(sections(runs, smooth).items()))


def sections(runs: Sequence[RunRecord], smooth: float = 0.02) -> dict[str, str]:
    """The page's parts that have something to show, as HTML by their headings."""
    found = {
        "In short" if len(runs) == 1 else "Runs": _overview(runs),
        "Training": _training(runs, smooth),
        "Held-out data": _drawn(runs, "eval", lambda key: key not in _SKIPPED, 0.0),
        "Speed": _drawn(runs, "train", lambda key: key in _SPEED, smooth),
        "Memory": _drawn(runs, "train", lambda key: key in _MEMORY, 0.0),
        "Where the time went": _time(runs),
        "Samples": _samples(runs),
    }
    return {heading: content for heading, content in found.items() if content}


def curves(runs: Sequence[RunRecord], kind: str, *metrics: str, smooth: float = 0.02) -> str:
    """Charts of some metrics alone, as HTML; nothing where no run has any of them.

    Args:
      runs: drawn over one another.
      kind: of the lines that have them, "train" or "eval".
      metrics: their names in docs/metrics.md; `loss/` stands for its parts (loss/en, ...) too.
      smooth: share of a training curve that its means reach over.
    """

    def wanted(key: str) -> bool:
        return key in metrics or f"{key.partition('/')[0]}/" in metrics

    charts = _drawn(runs, kind, wanted, smooth if kind == "train" else 0.0)
    return html.heading("Training" if kind == "train" else "Held-out data") + charts if charts else ""


# ---- Tables


def _overview(runs: Sequence[RunRecord]) -> str:
    figures = {run.name: _figures(run) for run in runs}
    columns = [name for name in figures[runs[0].name] if any(own[name] is not None for own in figures.values())]
    if len(runs) == 1:
        rows = [[path, str(value)] for path, value in runs[0].settings.items()]
        own = figures[runs[0].name]
        return html.cards({name: own[name] for name in columns}) + html.details(
            "Settings", html.table(["setting", "value"], rows)
        )
    overview = html.table(["run", *columns], [[run, *(own[name] for name in columns)] for run, own in figures.items()])
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    rows = [[path, *(str(run.settings.get(path, "")) for run in runs)] for path in paths]
    different = [row for row in rows if len(set(row[1:])) > 1]
    if not different:
        return overview + html.paragraph("Their settings are the same.", "soft")
    return overview + html.heading("Settings that differ") + html.table(["setting", *figures], different)


def _figures(run: RunRecord) -> dict[str, Any]:
    """Headline figures; None for what a run does not have."""
    train, held, job = (run.entries[kind][-1] if run.entries[kind] else {} for kind in ("train", "eval", "job"))

    def middle(key: str) -> float | None:
        return statistics.median(values) if (values := [y for _, y in curve(run.entries["train"], key)]) else None

    pace, mfu = middle("tokens_per_second"), middle("mfu_causal")
    return {
        "state": run.state,
        "step": train.get("step"),
        "training loss": train.get("loss"),
        "held-out loss": held.get("loss"),
        "lowest held-out loss": min((loss for _, loss in curve(run.entries["eval"], "loss")), default=None),
        "held-out bits per byte": held.get("bits_per_byte"),
        "steps skipped": int(train["skipped"]) if train.get("skipped") else None,
        "tokens/s, median": pace and round(pace),
        "MFU (causal), median": mfu and f"{mfu:.1%}",
        "goodput": f"{job['goodput']:.1%}" if job else None,
        "starts": job.get("starts"),
    }


# ---- Curves


def curve(entries: Iterable[Mapping], key: str) -> Curve:
    """(step, value) of the lines that have the key."""
    return [(entry["step"], entry[key]) for entry in entries if key in entry]


def smoothed(points: Curve, share: float) -> Curve:
    """The mean of each point and its neighbours, whose weights fall by about 1/e over that share of the curve.

    It does not lag behind a curve that falls, as a mean over the past does. What is not finite is left out.
    """
    points = [point for point in points if math.isfinite(point[1])]
    reach = max(share * len(points), 1.0)
    before, after = _decaying(points, reach), _decaying(points[::-1], reach)[::-1]
    return [
        (x, (past - y + future) / (past_weight - 1 + future_weight))
        for (x, y), (past, past_weight), (future, future_weight) in zip(points, before, after, strict=True)
    ]


def _decaying(points: Curve, reach: float) -> list[tuple[float, float]]:
    """(sum, weight) up to each point, with weights that decay."""
    kept, total, weight, result = 1 - 1 / reach, 0.0, 0.0, []
    for _, y in points:
        total, weight = kept * total + y, kept * weight + 1
        result.append((total, weight))
    return result


def thinned(points: Curve, most: int = _MOST) -> Curve:
    """A curve of at most so many points that looks the same: of each stretch its lowest and its highest."""
    if len(points) <= most:
        return points
    size, result = math.ceil(2 * len(points) / most), []
    for start in range(0, len(points), size):
        part = sorted(points[start : start + size], key=lambda point: point[1])
        result += sorted({part[0], part[-1]})
    return result


def _training(runs: Sequence[RunRecord], smooth: float) -> str:
    if not any(run.entries["train"] for run in runs):
        return html.paragraph("No step has been logged yet.", "soft")
    other = {*_SKIPPED, *_SPEED, *_MEMORY}
    curves = _drawn(runs, "train", lambda key: key not in other and not key.startswith("layers/"), smooth)
    layers = [_by_layer(runs, key) for key in _keys(runs, "train") if key.startswith("layers/")]
    note = f"Bold lines are means over about {smooth:.1%} of a run to both sides; single values are pale behind them."
    return (html.paragraph(note, "soft") if smooth else "") + curves + (html.charts(*layers) if layers else "")


def _drawn(runs: Sequence[RunRecord], kind: str, wanted: Callable[[str], bool], smooth: float) -> str:
    """Charts of the keys that `wanted` holds for; of a single run the parts of a metric (loss/en, ...) share one."""
    charts: dict[str, dict[str, Curve]] = {}
    for key in filter(wanted, _keys(runs, kind)):
        base, _, part = key.partition("/")
        for run in runs:
            if part and len(runs) == 1:
                charts.setdefault(f"{base}/", {})[part] = curve(run.entries[kind], key)
            elif points := curve(run.entries[kind], key):
                charts.setdefault(key, {})[run.name] = points
    return html.charts(*(_chart(kind, name, lines, smooth) for name, lines in charts.items())) if charts else ""


def _keys(runs: Sequence[RunRecord], kind: str) -> list[str]:
    """Keys of the lines of a kind in the order of their definitions, those of parts (loss/en) after the others."""
    keys = dict.fromkeys(key for run in runs for entry in run.entries[kind] for key in entry)
    metrics = {key: find(kind, key) for key in keys}  # None in a run of another version
    return sorted(keys, key=lambda key: ("/" in key, METRICS.index(metrics[key]) if metrics[key] else len(METRICS)))


def _chart(kind: str, name: str, lines: Mapping[str, Curve], smooth: float) -> str:
    """A chart of a metric; a name that ends in a slash stands for all its parts, whose single values are left out."""
    base = name.partition("/")[0]
    smooth = 0.0 if base == "learning_rate" else smooth
    means = {label: thinned(smoothed(points, smooth)) for label, points in lines.items()}
    parts = name.endswith("/")
    faint = {} if parts or not smooth else {label: thinned(points) for label, points in lines.items()}
    title = _title(kind, f"{name}x", f"{base}, by {_of(kind, name)}") if parts else _title(kind, name, name)
    return html.line_chart(title, means, "step", faint=faint, log=base in _LOGARITHMIC)


def _of(kind: str, name: str) -> str:
    """What the parts of a metric are: source, task."""
    metric = find(kind, f"{name}x")
    return metric.name.partition("/")[2].lower() if metric else "part"


def _title(kind: str, key: str, name: str) -> str:
    metric = find(kind, key)
    return f"{name} ({metric.unit})" if metric and metric.unit != "1" else name


def _by_layer(runs: Sequence[RunRecord], key: str) -> str:
    """A metric by layer: of a single run first, in the middle and last, of several last."""
    lines = {}
    for run in runs:
        entries = [entry for entry in run.entries["train"] if key in entry]
        if entries and len(runs) == 1:
            for index in sorted({0, len(entries) // 2, len(entries) - 1}):
                lines[f"step {entries[index]['step']:,}"] = list(enumerate(entries[index][key]))
        elif entries:
            lines[run.name] = list(enumerate(entries[-1][key]))
    return html.line_chart(_title("train", key, key), lines, "layer, from 0", log=True)


# ---- Time, samples


def _time(runs: Sequence[RunRecord]) -> str:
    last = {run.name: run.entries["job"][-1] for run in runs if run.entries["job"]}
    if not last:
        return ""
    bars = {name: {part: line[f"seconds/{part}"] for part in ACCOUNTS} for name, line in last.items()}
    rows = [[name, line["starts"], f"{line['goodput']:.1%}", *bars[name].values()] for name, line in last.items()]
    note = "Goodput is the share of the time since a run's first start that went into steps whose results were kept."
    return (
        html.paragraph(note, "soft")
        + html.stacked_bars("Seconds since the first start", bars, " s")
        + html.table(["run", "starts", "goodput", *(f"{part}, s" for part in ACCOUNTS)], rows)
    )


def _samples(runs: Sequence[RunRecord]) -> str:
    """What each run made of the prompts last; of a single run what it made of them before, too."""
    latest = {}
    for run in runs:
        if run.samples:
            step = max(sample["step"] for sample in run.samples)
            texts = {sample["prompt"]: sample["text"] for sample in run.samples if sample["step"] == step}
            latest[f"{run.name}, step {step:,}"] = texts
    if not latest:
        return ""
    prompts = dict.fromkeys(prompt for texts in latest.values() for prompt in texts)
    rows = [[prompt, *(texts.get(prompt) for texts in latest.values())] for prompt in prompts]
    content = html.table(["prompt", *latest], rows)
    if len(runs) == 1:
        before = [[sample["step"], sample["prompt"], sample["text"]] for sample in runs[0].samples]
        content += html.details("At all steps", html.table(["step", "prompt", "text"], before))
    return content
