"""GPUs that are not there: devices to compile for on a machine without one.

XLA compiles for a GPU from a description of it. The descriptions here hold the figures of XLA's own published ones
(openxla/xla, xla/backends/gpu/target_config/specs/: h200.txtpb and a100_sxm_80.txtpb at 4336d12, h100_sxm.txtpb at
0774019, which were written by real cards), with the versions of CUDA and cuDNN that are installed in place of theirs.
They agree for compiling kernels (registers, shared memory) and for laying out memory. What a compiler finds out by
running on the card is missing: the fastest of several matrix multiplications, and the workspace of cuDNN's attention.
"""

import dataclasses
import importlib.metadata
import importlib.util

import jax
from jax.experimental import topologies

from ctllm_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What tells one card from another; bytes, bytes per second, GHz."""

    name: str  # as the driver reports it: `jax.Device.device_kind`
    compute_capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    fpus_per_core: int
    clock: float
    memory: int
    memory_bandwidth: int
    l2_cache: int
    shared_memory_per_core: int
    shared_memory_per_block: int  # with the opt-in that XLA and Triton take


_HOPPER = {
    "compute_capability": (9, 0),
    "cores": 132,
    "fpus_per_core": 128,
    "clock": 1.98,
    "l2_cache": 52428800,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block": 232448,
}
GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        cores=108,
        fpus_per_core=64,
        clock=1.41,
        memory=85100068864,
        memory_bandwidth=2039040000000,
        l2_cache=41943040,
        shared_memory_per_core=167936,
        shared_memory_per_block=166912,
    ),
    "h100": Gpu(name="NVIDIA H100 80GB HBM3", memory=84942979072, memory_bandwidth=3352320000000, **_HOPPER),
    "h200": Gpu(name="NVIDIA H200", memory=151397597184, memory_bandwidth=4800000000000, **_HOPPER),
}

# The plugin and the libraries whose versions the compiler asks for: all of them come with the `cuda` extra.
PLUGIN = "jax_cuda13_plugin"
_RUNTIME, _CUDNN = "nvidia-cuda-runtime", "nvidia-cudnn-cu13"


def available() -> bool:
    """Whether the plugin that compiles for GPUs is installed; it needs no GPU."""
    return importlib.util.find_spec(PLUGIN) is not None


def topology(chip: str, hosts: int, gpus_per_host: int) -> list[jax.Device]:
    """Devices of `hosts` machines with `gpus_per_host` GPUs each, to compile for; nothing can run on them.

    A machine is one NVLink domain, as XLA finds on real ones. The process must not have looked for a real GPU and
    failed: set JAX_PLATFORMS=cpu.

    Args:
      chip: a name in `GPUS`.
      hosts: machines.
      gpus_per_host: GPUs of each.

    Raises:
      UserError: an unknown chip, or the CUDA plugin is not installed.
    """
    if chip not in GPUS:
        raise UserError(f"GPU {chip!r} is unknown; there are: {', '.join(sorted(GPUS))}")
    if not available():
        raise UserError("compiling for GPUs needs the CUDA plugin, but no GPU: pip install 'ctllm-jax[cuda]'")
    described = topologies.get_topology_desc(
        platform="cuda", target_config=target(GPUS[chip]), topology=f"{hosts}x1x{gpus_per_host}"
    )
    return described.devices


def target(gpu: Gpu) -> str:
    """The card as a stream_executor.GpuTargetConfigProto in text form, with the versions that are installed."""
    major, minor = gpu.compute_capability
    runtime = importlib.metadata.version(_RUNTIME).split(".")
    cudnn = importlib.metadata.version(_CUDNN).split(".")
    return f"""
gpu_device_info {{
  name: "{gpu.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_core: {gpu.shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
runtime_version {{ major: {runtime[0]} minor: {runtime[1]} patch: {runtime[2]} }}
device_description_str: "{gpu.name}"
"""
