"""How each shipped layout of the 2B model is started, what to expect of it, and which settings it runs with.

    python benchmarks/profiles.py > docs/profiles.md

The layouts are those of configs/hardware.py, the figures those of docs/plans.md (benchmarks/plans.py writes it).
Facts: runtime versions of TPU VMs as https://cloud.google.com/tpu/docs/runtimes lists them for JAX, GPUs by the names
of https://cloud.google.com/kubernetes-engine/docs/how-to/gpus.
"""

import pathlib
import shlex

from configs import hardware
from ctllm_jax.hardware import Slice, parse_slice

ROOT = pathlib.Path(__file__).resolve().parent.parent
TPUS = {  # {chip: runtime version of its VMs, GKE's name of its slices}
    "v4": ("tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": ("v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": ("v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": ("v2-alpha-tpuv6e", "tpu-v6e-slice"),
}
GPUS = {"a100": "nvidia-a100-80gb", "h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb"}  # GKE's names
MEASURED = {"h200": 38_386}  # tokens/s of the 2B step on one device alone: benchmarks/step.py, docs/log.md
TOKENS = 1254.68e9  # that CT-LLM was trained on
PREPARE = "sudo apt-get update && sudo apt-get -o DPkg::Lock::Timeout=600 install -y python3.11-venv"
FRACTION = "XLA_CLIENT_MEM_FRACTION=0.92"
REASONS = {  # {option of the step's compiler in configs/hardware.py: why}
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "the compiler may cut a product into pieces to send weights "
    "while it multiplies; the pieces of a layer of this size are small, and its own estimate of the step more than "
    "doubles (v5e:4x4): weights are gathered whole, ahead of use",
}

HEADER = """\
# Starting the 2B model

Made by `python benchmarks/profiles.py > docs/profiles.md` from [configs/hardware.py](../configs/hardware.py) and
[plans.md](plans.md). **None of these has run on its hardware** as it stands; what has been run is the step of h200x1,
and `ctllm train` with 4 rows a step on such a GPU. Names in capitals are yours. Add `--dry_run` before the `--` and
read what would be done; add `--spot` where the cloud may take the hosts away: the launcher asks for them again, and the
run goes on from its newest checkpoint. On the very machine that has the GPUs, what follows the `--` is enough, behind
`ctllm`.

`STORE` is a folder of `ctllm tokenize`, on a bucket (`gcloud storage cp -r STORE gs://BUCKET/`) or on a disk that all
hosts see. A store without some of CT-LLM's sources needs `--config.data.rates.NAME=0` for each.

## What to expect

Tokens a second of all chips together, in the order of what they are worth:

- **measured**: the step on one H200, 8 rows at a time ([log](log.md)), times the devices. Links and other hosts are not
  in it.
- **estimated**: by the TPU compiler, with the static cycles of the attention kernels and without waiting for
  collectives. It compares plans; it is no forecast.
- **at most**: the same where the kernels' cycles cannot be had (v4, v6e), or, for GPUs, what FLOPs, memory and links
  allow at full speed. No run reaches it.

Days are for CT-LLM's 1,254.68 billion tokens at the figure of their row, nothing lost. `ctllm train` prints what it
reaches from its first minute on, and its share of the chip's peak.
"""
SETTINGS = """\
## Settings, and why

What is not named here is left as JAX, XLA and NCCL have it: without the hardware nothing else could be shown to help.

| setting | where | on | why |
|---|---|---|---|
"""
OTHERS = (
    (
        "`--config.deterministic=True`",
        "yours",
        "GPUs",
        "a run that is taken up gives the same bits; without it XLA adds up in any order and chooses kernels by their "
        "time. The step on one H200 takes 913 ms in place of 854; jax 0.12 refused to compile it where no GPU is at "
        "hand ([log](log.md))",
    ),
    (
        f"`{FRACTION}`",
        "`--variables` of the launcher",
        "GPUs",
        "the plans count on it; by itself JAX takes 0.75 of a GPU's memory",
    ),
    (
        "`xla_gpu_enable_latency_hiding_scheduler`",
        "not set",
        "GPUs",
        "guides advise it; with jax 0.12 it is on by itself: the compiled step of h100x8 is the same text with and "
        "without it, and with `'False'` products wait for its gathers ([log](log.md))",
    ),
    (
        "mesh: `fsdp` within a slice or host, `slice` across",
        "config",
        "all",
        "weights are gathered for every layer, over the fast links (ICI, NVLink) alone; between slices and hosts only "
        "gradients are added, once a step",
    ),
    (
        "one process a host",
        "launcher",
        "GPUs",
        "it has all devices of its host, so NVLink is used without a process in between; JAX's own look at SLURM would "
        "give each process one device",
    ),
    (
        "`/dev/shm` in memory",
        "launcher, `gke`",
        "GPUs",
        "NCCL puts buffers there, and a pod has 64 MiB unless told otherwise",
    ),
    (
        "`--variables='NCCL_SOCKET_IFNAME=ethN NCCL_IB_HCA=mlx5'`",
        "yours",
        "several GPU hosts",
        "only where NCCL picks the wrong network by itself: `NCCL_DEBUG=INFO` shows what it picked",
    ),
    (
        "`--pod=FILE`",
        "yours, `gke`",
        "GKE",
        "a service account that may write to the bucket; between GPU hosts also the networks (GPUDirect), which come "
        "with volumes, annotations and NCCL's plugin: Google's guide for the machine type has them as YAML",
    ),
    (
        "`--config.watch.notices=http://metadata.google.internal`",
        "in the commands",
        "Google Cloud",
        "a notice of maintenance or preemption counts as a signal: all save at the same step",
    ),
    (
        "`--prepare='... python3.11-venv' --python=python3.11`",
        "in the commands",
        "TPU VMs",
        "Ubuntu 22.04, on which the images stand, has Python 3.10; leave both out where `python3` is 3.11 to 3.13",
    ),
)


def figures() -> dict[str, dict[str, str]]:
    """The rows of docs/plans.md: {slice: {column: cell}}."""
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (ROOT / "docs" / "plans.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def expectation(target: Slice, row: dict[str, str]) -> tuple[str, str, str]:
    """(tokens/s, what kind of figure that is, days)."""
    if measured := MEASURED.get(target.chip.name, 0) * target.devices:
        times = f", times {target.devices}" if target.devices > 1 else ""
        return f"{measured:,}", f"measured on one{times}", f"{TOKENS / measured / 86_400:,.1f}"
    kind = "at most" if row["tokens/s"].startswith("at most") else "estimated"
    return row["tokens/s"].removeprefix("at most "), kind, row["days"]


def commands(name: str, target: Slice) -> list[str]:
    """The command lines that start the layout `name`, one for each target of the launcher that can have its hosts."""
    bucket = ("gs://BUCKET/STORE", "--config.watch.notices=http://metadata.google.internal ", "gs://BUCKET/RUN")
    shared = ("/SHARED/STORE", "", "/SHARED/RUN")
    if target.chip.platform == "tpu":
        runtime, accelerator = TPUS[target.chip.name]
        slices = f" --slices={target.count}" if target.count > 1 else ""
        machine = f"--type={_cloud_type(target)} --runtime={runtime}{slices}"
        topology = "x".join(map(str, target.shape))
        python = f"--python=python3.11 --prepare='{PREPARE}'"
        return [
            _line(f"tpu --name=ct-llm --zone=ZONE {machine} --extra=tpu {python}", name, bucket),
            _line(f"gke --accelerator={accelerator} --topology={topology}{slices} --extra=tpu", name, bucket),
        ]
    hosts, accelerator = target.count, GPUS[target.chip.name]
    names = "HOST" if hosts == 1 else f"HOST1,...,HOST{hosts}"
    per_host = target.devices // hosts
    sbatch = f"--partition=PARTITION --gpus-per-node={per_host} --cpus-per-task={8 * per_host} --time=1-0"
    gpus = f"--extra=cuda --variables={FRACTION}"
    pod = f"--nodes={hosts}" + (f" --gpus={per_host}" if per_host != target.chip.per_host else "")
    return [
        _line(f"ssh --hosts={names} {gpus}", name, shared),
        _line(f"slurm --nodes={hosts} --sbatch='{sbatch}' {gpus}", name, shared),
        _line(f"gke --accelerator={accelerator} {pod} {gpus.replace('cuda', 'cuda,gcs')}", name, bucket),
    ]


def _line(own: str, name: str, where: tuple[str, str, str]) -> str:
    store, notices, run = where
    config = shlex.quote(f"--config=configs/pretrain.py:ct_llm_2b@{name}")  # two slices have a * in their name
    return f"ctllm launch {own} -- \\\n  train {config} --config.data.store={store} {notices}--workdir={run}"


def _cloud_type(target: Slice) -> str:
    """One slice as gcloud names it: by TensorCores, of which v4 and v5p have two a chip, or by chips."""
    count = target.devices // target.count * (2 if target.chip.name in ("v4", "v5p") else 1)
    return f"{'v5litepod' if target.chip.name == 'v5e' else target.chip.name}-{count}"


def page() -> str:
    """The whole page."""
    rows, lines = figures(), [HEADER]
    lines.append("| layout | chips | tokens/s | | days | memory GiB, of |\n|---|---|---|---|---|---|")
    for name in hardware.SLICES:
        target, row = parse_slice(name), rows[name]
        cells = (name, str(target.devices), *expectation(target, row), f"{row['memory GiB']}, {row['of']}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", SETTINGS.rstrip()]
    for option, used in _options().items():
        lines.append(f"| `{option}={used[0]}` | config, `xla_options` | {used[1]} | {REASONS[option]} |")
    lines += [f"| {' | '.join(row)} |" for row in OTHERS]
    for name in hardware.SLICES:
        lines += ["", f"## {name}", "", "```", *commands(name, parse_slice(name)), "```"]
    return "\n".join(lines) + "\n"


def _options() -> dict[str, tuple[str, str]]:
    """{option of the compiler: (its value, the kind of chips that have it)}."""
    found = {}
    for name, layout in hardware.SLICES.items():
        for option, value in layout["xla_options"].items():
            found[option] = (value, {"tpu": "TPUs", "gpu": "GPUs"}[parse_slice(name).chip.platform])
    return found


if __name__ == "__main__":
    print(page(), end="")
