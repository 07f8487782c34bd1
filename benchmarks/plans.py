"""The plan of every shipped 2B config on the slice that it is for, as docs/plans.md has it.

    python benchmarks/plans.py > docs/plans.md

Compiles where a compiler is installed (`pip install 'ctllm-jax[tpu]'` for the TPUs), a minute each and once only.
"""

import os
import sys

from aot_cases import case_config

from configs import hardware
from ctllm_jax.hardware import GIB, parse_slice
from ctllm_jax.plan.compile import ENVIRONMENT, missing
from ctllm_jax.plan.estimate import make_plan

HEADER = """\
# Plans of the 2B model

Made by `python benchmarks/plans.py`, which compiles every config of `configs/hardware.py` for its slice; none of them
has run on the hardware as it stands. Batch: 512 rows of 4,096 tokens. Memory is at the fullest moment, "of" what a
program may use. "Least" is the largest of what FLOPs, memory and links need at their full speed. "Estimate" is the TPU
compiler's, with the static cycles of the attention kernels where it states them (v5e, v5p) and without waiting for
collectives: good for comparing plans, no forecast. Days and chip-hours are for CT-LLM's 1,254.68 billion tokens,
nothing lost, at the estimate; "at least" where the kernels' time or all of it is missing.
`ctllm plan --config=configs/pretrain.py:ct_llm_2b@SLICE --slice=SLICE` has the rest.
"""
COLUMNS = ("slice", "chips", "mesh", "rows x times", "memory GiB", "of", "by", "least s", "estimate s", "tokens/s",
           "of peak", "days", "chip-hours")  # fmt: skip


def main() -> None:
    """Prints the page."""
    os.environ.update(ENVIRONMENT)
    print(HEADER)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in hardware.SLICES:
        target = parse_slice(name)
        plan = make_plan(case_config({"slice": name}), target, tokens=1254.68, compiling=missing(target) is None)
        mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
        compiled = plan.compiler_seconds is not None
        most, least = ("", "") if plan.estimated else ("at most ", "at least ")
        cells = [
            name,
            plan.devices,
            mesh or "one device",
            f"{plan.rows} x {plan.microbatches}",
            f"{plan.needed / GIB:.2f}",
            f"{plan.memory / GIB:.2f}",
            "compiler" if plan.compiled else "arithmetic",
            f"{max(plan.floor_seconds.values()):.3f}",
            f"{least}{plan.seconds:.3f}" if compiled else "n/a",
            f"{most}{plan.tokens_per_second:,.0f}",
            f"{most}{plan.share_of_peak(plan.seconds):.1%}" if compiled else "n/a",
            f"{least}{plan.days:,.1f}",
            f"{least}{plan.days * 24 * plan.devices:,.0f}",
        ]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        if not plan.fits:
            sys.exit(f"plans: {name} does not fit: {plan.compiled.refusal if plan.compiled else 'by arithmetic'}")


if __name__ == "__main__":
    main()
