"""A plan as a person reads it."""

from collections.abc import Sequence

from ctllm_jax.hardware import GIB, Slice
from ctllm_jax.plan.estimate import Plan

_NOTE = """\
The compiler's estimate adds up the cycles that the TPU compiler states for every operation, loops multiplied out,
divided by the clock, and the static cycles of the attention kernels (each compiled alone, a causal pass of one document
a row). Waiting for collectives is not in it, and it was never held against a chip: use it to compare plans."""


def render(plan: Plan, not_compiled: str | None) -> str:
    """The whole plan; `not_compiled` says why there is no compilation, where there is none."""
    parts = [_heading(plan), _memory(plan, not_compiled), _work(plan), _time(plan), _budget(plan)]
    return "\n\n".join(part for part in parts if part)


def _heading(plan: Plan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    return "\n".join(
        [
            f"{plan.parameters:,} parameters on {plan.slice}: {plan.devices} x {plan.chip}, mesh {mesh}",
            f"{plan.tokens_per_step:,} tokens a step; a device takes {plan.rows} sequences at a time, "
            f"{plan.microbatches} times",
            f"attention {plan.attention}, remat {plan.remat}, cross-entropy {plan.loss}",
        ]
    )


def _memory(plan: Plan, not_compiled: str | None) -> str:
    compiled = plan.compiled if plan.compiled and not plan.compiled.refusal else None
    lines = [f"{'Memory of a device, GiB':<34}{'arithmetic':>12}{'compiler':>12}"]

    def row(name: str, value: int, theirs: int | None = None) -> None:
        shown = "" if theirs is None else f"{theirs / GIB:12.3f}"
        lines.append(f"  {name:<32}{value / GIB:12.3f}{shown}")

    for name, value in plan.arguments.items():
        row(name, value)
    arguments, temporary = sum(plan.arguments.values()), sum(plan.temporary.values())
    row("= arguments", arguments, compiled.arguments if compiled else None)
    for name, value in plan.temporary.items():
        row(name, value)
    row("= temporary, at the fullest moment", temporary, compiled.peak - compiled.arguments if compiled else None)
    row("in all", arguments + temporary, compiled.peak if compiled else None)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"  {verdict} in {plan.memory / GIB:.2f}")
    if plan.compiled and plan.compiled.refusal:
        lines.append(f"  the compiler refuses it: {plan.compiled.refusal}")
    if plan.compiled is None:
        lines.append(f"  arithmetic only: {not_compiled}")
    return "\n".join(lines)


def _work(plan: Plan) -> str:
    work = plan.work
    lines = [
        "Work of a device and step",
        f"  {work.model_flops / 1e12:,.2f} TFLOP of the model (causal half of attention; "
        f"{work.model_flops_full / 1e12:,.2f} with the whole square)",
        f"  {work.hardware_flops / 1e12:,.2f} TFLOP with what is computed again",
        f"  {work.memory_bytes / 1e9:,.1f} GB through its memory at least",
    ]
    for one in plan.collectives:
        over = "DCN or InfiniBand" if one.link == "network" else "ICI or NVLink"
        lines.append(
            f"  {one.kind} of {one.what} over {one.axis} ({one.ways}): {one.bytes / 1e6:,.1f} MB x {one.times:,} sent "
            f"over {over}, {one.seconds:.3f} s at its whole bandwidth"
        )
    if plan.compiled and plan.compiled.collectives:
        kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sorted(plan.compiled.collectives.items()))
        lines.append(f"  in the compiled program, results: {kinds}")
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    bound = max(plan.floor_seconds, key=plan.floor_seconds.get)
    lines = [
        "Time of a step, seconds",
        f"  {max(plan.floor_seconds.values()):.3f} at least, bound by {bound} "
        f"({', '.join(f'{name} {seconds:.3f}' for name, seconds in plan.floor_seconds.items())})",
    ]
    if plan.compiler_seconds is not None:
        kernels = (
            "attention kernels not counted" if plan.kernel_seconds is None else f"{plan.kernel_seconds:.3f} kernels"
        )
        lines.append(f"  {plan.seconds:.3f} by the compiler's estimate: {plan.compiler_seconds:.3f} + {kernels}")
    what = "by that estimate" if plan.estimated else "at most"
    lines.append(
        f"  {plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second / plan.devices:,.0f} a chip, "
        f"{plan.share_of_peak(plan.seconds):.1%} of peak (causal) {what}"
    )
    return "\n".join([*lines, *(["", _NOTE] if plan.compiler_seconds is not None else [])])


def _budget(plan: Plan) -> str:
    what = "estimated" if plan.estimated else "at least"
    return (
        f"{plan.budget_tokens / 1e9:,.2f} billion tokens: {plan.budget_tokens / plan.tokens_per_step:,.0f} steps, "
        f"{what} {plan.days:,.1f} days, {plan.days * 24 * plan.devices:,.0f} chip-hours, nothing lost to restarts"
    )


def render_ranking(ranking: Sequence, target: Slice) -> str:
    """Candidates of a search, fastest first."""
    lines = [f"{'rank':<5}{'s/step':>9}{'of peak':>9}{'GiB':>8}  by          change"]
    for number, candidate in enumerate(ranking, 1):
        plan = candidate.plan
        source = "compiler" if plan.compiler_seconds is not None else "compiled" if plan.compiled else "arithmetic"
        share = plan.share_of_peak(plan.seconds)
        fits = "" if plan.fits else "  DOES NOT FIT"
        lines.append(
            f"{number:<5}{plan.seconds:>9.3f}{share:>9.1%}{plan.needed / GIB:>8.2f}  {source:<10}  "
            f"{candidate.flags or '(as it is)'}{fits}"
        )
    return f"On {target.name}, {target.chip.memory / GIB:.2f} GiB a device:\n" + "\n".join(lines)
