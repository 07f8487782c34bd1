"""Scores as text, for people."""


def table(result: dict) -> str:
    """The scores of `ctllm eval`: held-out text, benchmarks with their chance levels."""
    lines = [f"model {result['model']} ({result['digest']})"]
    if result["perplexity"]:
        lines += ["", *_perplexity(result["perplexity"])]
    if result["benchmarks"]:
        lines += ["", *_benchmarks(result["benchmarks"])]
    if result["missing"]:
        lines += ["", f"left out, for want of files: {', '.join(result['missing'])}"]
    return "\n".join(lines)


def _perplexity(sources: dict) -> list[str]:
    columns = ("tokens", "nats_per_token", "stderr", "perplexity", "bits_per_byte", "unigram_bits_per_byte")
    lines = [_row("held-out", [name.replace("unigram_bits_per_byte", "unigram") for name in columns])]
    return lines + [_row(source, [_number(figures[name]) for name in columns]) for source, figures in sources.items()]


def _benchmarks(benchmarks: dict) -> list[str]:
    """Scores in per cent: subsets weighed equally (macro) and by size (micro), groups of subsets below their task."""
    heads = ["questions", "by", "macro", "+-", "micro", "chance", "unreadable", "unfinished", "cut", "fewer shots"]
    lines = [_row("benchmark", heads)]
    for name, found in benchmarks.items():
        if found["kind"] == "rolling":
            bits = f"  {found['bits_per_byte']:.4f} bits per byte"
            lines.append(_row(name, [_number(found["questions"]), bits]))
            continue
        if found["kind"] == "stance":
            lines += _leanings(name, found)
            continue
        if found["missing"]:
            lines.append(f"{name}: without {', '.join(found['missing'])}, for want of files")
        score, failed = found["scores"][found["headline"]], found.get("failed", {}).get(found["headline"])
        counts = [_number(n) for n in (failed, found.get("unfinished"), found["cut"], found["fewer_shots"])]
        lines.append(_row(name, [_number(score["n"]), found["headline"], *_averages(score, found["chance"]), *counts]))
        if decided := found.get("decided", {}).get(found["headline"]):
            lines += _decided(decided)
        for group, own in score["groups"].items():
            lines.append(_row(f"  {group}", [_number(own["n"]), "", *_averages(own, found["chance"])]))
    return lines


def _decided(found: dict) -> list[str]:
    """The score of the items that are decided, and how often each outcome came."""
    own, outcomes = found["scores"], ", ".join(f"{name} {n:,}" for name, n in found["outcomes"].items())
    score = [_row("  where decided", [_number(own["n"]), "", *_averages(own, None)])] if own else []
    return [*score, f"  outcomes: {outcomes}"]


def _leanings(name: str, found: dict) -> list[str]:
    """What a questionnaire found, from -1 to 1: a line for each metric, and the headline's for each subset."""

    def line(label: str, own: dict, about: str) -> str:
        error = "-" if own["stderr"] is None else f"{own['stderr']:.3f}"
        return _row(label, [_number(own.get("n", found["questions"])), about, f"{own['mean']:+.3f}", error])

    lines = [line(name, own["macro"], metric) for metric, own in found["leanings"].items()]
    headline = found["leanings"][found["headline"]]
    return lines + [line(f"  {subset}", own, found["headline"]) for subset, own in headline["subsets"].items()]


def _averages(score: dict, chance: float | None) -> list[str]:
    parts = (score["macro"]["mean"], score["macro"]["stderr"], score["micro"]["mean"], chance)
    return ["-" if part is None else f"{100 * part:.2f}" for part in parts]


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<22}" + "".join(f"{cell:>15}" for cell in cells)


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
