"""Ahead of time: what TPU compilers say of the 2B training step, without a TPU.

    python benchmarks/aot.py [--quick] [--part PART] [--slice NAME ...] [--record FILE]

step     memory, estimated time, traffic and share of peak of the shipped configs on six slices
peers    the same step with jax's flash attention (time, memory) and jax's splash attention (memory) in place of ours
loss     the 2B head alone, dense and in chunks: temporary memory and estimated time
memory   arithmetic against compiler over many layouts; --record keeps what the compiler said, for the tests

benchmarks/README.md says what is counted, and how. Every time is the compiler's estimate, never held against a chip.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from aot_cases import CASES, FLASH_BLOCKS, SPEED_SLICES, case_config, one_microbatch
from common import finish, table

from ctllm_jax.hardware import GIB, parse_slice
from ctllm_jax.plan import arithmetic
from ctllm_jax.plan.compile import ENVIRONMENT, Compiled, compiled, missing
from ctllm_jax.plan.estimate import Plan, attention_seconds, make_plan
from ctllm_jax.plan.kernel_cycles import CORES, static_cycles

HERE = pathlib.Path(__file__).resolve().parent


def main() -> None:
    """Runs the parts that are asked for and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the loss and, of the steps, v5e:4x4 alone")
    parser.add_argument("--part", choices=("step", "peers", "loss", "memory"), help="only this one")
    parser.add_argument("--slice", nargs="*", help="other slices for the steps")
    parser.add_argument("--record", help="file for what the compiler said of the layouts")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if reason := missing(parse_slice("v5e:4x4")):
        sys.exit(f"aot: nothing to do: {reason}")
    parts = [options.part] if options.part else ["loss", "step"] if options.quick else ["loss", "step", "peers"]
    slices, figures = options.slice or (SPEED_SLICES[:1] if options.quick else SPEED_SLICES), {}
    if "loss" in parts:
        figures |= loss()
    if "step" in parts:
        figures |= steps(slices)
    if "peers" in parts:
        figures |= peers(slices[:2])
    if "memory" in parts:
        figures |= memory(options.record)
    finish(figures)


def steps(names: list[str]) -> dict:
    """The shipped configs as they would run."""
    plans = [shipped(name) for name in names]
    table(
        "The shipped 2B configs, one device and step (compiler's estimates; waiting for collectives not counted)",
        ["slice", "rows x times", "peak GiB", "of", "s, no kernels", "kernels", "of peak, no kernels", "of peak"],
        [
            [
                plan.slice,
                f"{plan.rows} x {plan.microbatches}",
                plan.needed / GIB,
                plan.memory / GIB,
                plan.compiler_seconds,
                plan.kernel_seconds if plan.kernel_seconds is not None else "n/a",
                plan.share_of_peak(plan.compiler_seconds),
                plan.share_of_peak(plan.seconds) if plan.estimated else "n/a",
            ]
            for plan in plans
        ],
    )
    table(
        "Results of collectives in a step, GB",
        ["slice", "all-gather", "all-reduce", "all-to-all", "others"],
        [[plan.slice, *_traffic(plan)] for plan in plans],
    )
    return {f"{plan.slice} share of peak": plan.share_of_peak(plan.seconds) for plan in plans if plan.estimated} | {
        f"{plan.slice} share of peak without kernels": plan.share_of_peak(plan.compiler_seconds) for plan in plans
    }


def shipped(name: str) -> Plan:
    """The plan of the config that is shipped for a slice."""
    return make_plan(case_config({"slice": name}), parse_slice(name), tokens=0.0, compiling=True)


def _traffic(plan: Plan) -> list[float]:
    kinds = dict(plan.compiled.collectives)
    named = [kinds.pop(kind, 0) / 1e9 for kind in ("all-gather", "all-reduce", "all-to-all")]
    return [*named, sum(kinds.values()) / 1e9]


def peers(names: list[str]) -> dict:
    """The step with other kernels, in processes of their own; jax's splash has no static cycles."""
    rows, figures = [], {}
    for name in names:
        for kernel in ("ours", "jax flash", "jax splash"):
            found = child("aot_peers.py", {"slice": name, "kernel": kernel})
            kernels = None
            if kernel == "ours":
                known = Compiled(**{field.name: found[field.name] for field in dataclasses.fields(Compiled)})
                kernels = attention_seconds(one_microbatch(name), parse_slice(name), known)
            elif kernel == "jax flash":
                kernels = flash_seconds(name, found["kernels"])
            calls = " + ".join(f"{count} {called}" for called, count in sorted(found["kernels"].items()))
            sizes = found["peak"] / GIB, found["temporary"] / GIB
            rows.append([f"{name} {kernel}", *sizes, found["seconds"], "n/a" if kernels is None else kernels, calls])
            figures[f"{name} {kernel} peak GiB"] = found["peak"] / GIB
            if kernels is not None:
                figures[f"{name} {kernel} s"] = found["seconds"] + kernels
    title = "The step with other attention kernels, one microbatch (s: compiler's estimate)"
    table(title, ["slice and kernel", "peak GiB", "temporary GiB", "s, no kernels", "s, kernels", "calls"], rows)
    return figures


def flash_seconds(name: str, found: dict[str, int]) -> float:
    """Time of the calls of jax's flash attention: static cycles of a causal pass, a head on each core."""
    config, target = one_microbatch(name), parse_slice(name)
    cores = CORES[target.chip.name]
    size = {"kv_heads": cores, "length": config.model.max_length, "head_dim": config.model.head_dim}
    total = 0
    for called, count in found.items():
        kernel = next((part for part in ("dq", "dkv") if part in called), "forward")
        request = {"measured": "causal", "kernel": kernel, "blocks": FLASH_BLOCKS[target.chip.name][kernel], **size}
        total += count * max(static_cycles(target.chip.name, "attention:jax_flash", request).values())
    rows = arithmetic.share(config, target).rows
    return total * rows * config.model.num_heads / cores / target.chip.clock


def loss() -> dict:
    """The head and its loss on one v5e chip: 4096 tokens, 125,824 ids, width 2048."""
    found = {form: child("aot_loss.py", {"form": form}) for form in ("dense", "chunked")}
    head = 2 * 2048 * 125_824
    rows = [
        [form, one["temporary"] / 2**20, one["temporary"] / head, one["seconds"] * 1e3] for form, one in found.items()
    ]
    table("Cross-entropy of the 2B head, v5e", ["form", "temporary MiB", "x bf16 head", "ms"], rows)
    chunked, dense = found["chunked"], found["dense"]
    return {
        "loss memory x head": chunked["temporary"] / head,
        "loss time x dense": chunked["seconds"] / dense["seconds"],
    }


def memory(record: str | None) -> dict:
    """Arithmetic against compiler."""
    rows, kept, worst = [], [], 0.0
    for case in CASES:
        target = parse_slice(case["slice"])
        if missing(target):
            continue
        config = case_config(case)
        found = compiled(config, target)
        if found.refusal:
            rows.append([_label(case), "refused", found.refusal, "", ""])
            continue
        arguments = sum(arithmetic.arguments(config, target).values())
        temporary, theirs = sum(arithmetic.temporary(config, target).values()), found.peak - found.arguments
        worst = max(worst, abs(temporary / theirs - 1))
        rows.append([_label(case), arguments / found.arguments, temporary / GIB, theirs / GIB, temporary / theirs])
        kept.append({"case": case, **dataclasses.asdict(found)})
    title = "Arithmetic against compiler: arguments, and temporary memory at the fullest moment"
    table(title, ["layout", "arguments, ratio", "arithmetic GiB", "compiler GiB", "ratio"], rows)
    if record:
        _keep(pathlib.Path(record), kept)
    return {"worst relative error of temporary memory": worst, "layouts": len(kept)}


def _keep(file: pathlib.Path, entries: list[dict]) -> None:
    """Puts entries into a file of JSON lines, in the order of CASES, in place of those of the same cases: TPUs and GPUs
    compile in different environments."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    by_case = {json.dumps(entry["case"]): entry for entry in [*map(json.loads, lines), *entries]}
    kept = [by_case[key] for key in map(json.dumps, CASES) if key in by_case]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


def _label(case: dict) -> str:
    return " ".join(str(value) if key == "slice" else f"{key}={value}" for key, value in case.items())


def child(script: str, request: dict) -> dict:
    """What one of the scripts beside this one prints for a request: a JSON object on its last line."""
    command = [sys.executable, str(HERE / script), json.dumps(request)]
    ended = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{script} {request}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
