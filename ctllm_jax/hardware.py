"""Accelerators and slices of them: what a device can do, and which slice a name means.

Sources: Google Cloud's TPU system architecture pages (v4, v5e, v5p, v6e: peak, memory, bandwidth, interconnect),
Google DeepMind's "How To Scale Your Model" (DCN per chip), NVIDIA's data sheets of A100, H100 SXM and H200 SXM.
"""

import dataclasses
import math
import re

import jax
from jax.sharding import AbstractDevice

from ctllm_jax.common.errors import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device (a whole chip here). Bandwidths are one way, bytes/s."""

    name: str
    kind: str  # how `jax.Device.device_kind` begins
    platform: str  # "tpu" or "gpu"
    peak_flops: float  # dense bf16, FLOP/s
    memory: int  # bytes a program may use
    memory_bandwidth: float
    link_bandwidth: float  # to the neighbours in the slice, all links together: ICI, NVLink
    network_bandwidth: float  # to other slices or hosts, a device's share: DCN, InfiniBand
    clock: float | None  # Hz, for cycles that a compiler states; derived from the peak and the size of the matrix unit
    per_host: int


# Usable TPU memory is what the compiler states when a program exceeds it; v4's and v5p's are the chip's, less the same
# share. A GPU program may use what XLA_CLIENT_MEM_FRACTION (0.92 here; JAX's default is 0.75) leaves it.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", "tpu", 275e12, int(30.75 * GIB), 1.228e12, 300e9, 6.25e9, 1.05e9, 4),
        Chip("v5e", "TPU v5 lite", "tpu", 197e12, int(15.75 * GIB), 0.819e12, 200e9, 3.125e9, 1.5e9, 4),
        Chip("v5p", "TPU v5", "tpu", 459e12, int(95.74 * GIB), 2.765e12, 600e9, 6.25e9, 1.75e9, 4),
        Chip("v6e", "TPU v6 lite", "tpu", 918e12, int(31.24 * GIB), 1.638e12, 448e9, 12.5e9, 1.75e9, 4),
        Chip("a100", "NVIDIA A100", "gpu", 312e12, int(0.92 * 79.2 * GIB), 2.039e12, 300e9, 25e9, None, 8),
        Chip("h100", "NVIDIA H100", "gpu", 989e12, int(0.92 * 79.2 * GIB), 3.35e12, 450e9, 50e9, None, 8),
        Chip("h200", "NVIDIA H200", "gpu", 989e12, int(0.92 * 139.8 * GIB), 4.8e12, 450e9, 50e9, None, 8),
    )
}


def current_device() -> jax.Device | AbstractDevice:
    """What is compiled for: the devices of the mesh in use (they may be only described), else the default device."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def chip_of(device: jax.Device | AbstractDevice) -> Chip | None:
    """The chip that a device is, or None where its kind is not in the table: a guess would be worse."""
    fitting = [chip for chip in CHIPS.values() if device.device_kind.startswith(chip.kind)]
    return max(fitting, key=lambda chip: len(chip.kind), default=None)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices that are used together: TPU slices (several are joined by DCN), or GPU hosts (joined by InfiniBand)."""

    chip: Chip
    shape: tuple[int, ...]  # TPU: the topology of one slice; GPU: (devices of a host,)
    count: int  # slices, or hosts

    @property
    def devices(self) -> int:
        """Devices in all."""
        return math.prod(self.shape) * self.count

    @property
    def name(self) -> str:
        """As `parse_slice` reads it."""
        if self.chip.platform == "gpu":
            return f"{self.chip.name}x{self.devices}"
        topology = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return topology if self.count == 1 else f"{self.count}*{topology}"


# Cloud TPU accelerator types. Those of v4 and v5p count TensorCores, two a chip; those of v5e and v6e count chips.
_CORES_3D = {
    8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8), 512: (4, 8, 8),
    1024: (8, 8, 8), 2048: (8, 8, 16), 4096: (8, 16, 16), 8192: (16, 16, 16),
}  # fmt: skip
_CHIPS_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CLOUD = {"v4": _CORES_3D, "v5p": _CORES_3D, "v5litepod": _CHIPS_2D, "v5e": _CHIPS_2D, "v6e": _CHIPS_2D}
_FORMS = "v5e:16x16, v5p:4x4x4, 2*v5e:16x16 (two slices), v5p-128, v5litepod-256, h100x8, h200x64"


def parse_slice(text: str) -> Slice:
    """A slice by its topology ("v5e:16x16"), its cloud name ("v5p-128": 64 chips) or its GPUs ("h200x16").

    Raises:
      UserError: no such slice; the message names the forms.
    """
    if match := re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text):
        count, name, shape = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
        known = CHIPS.get(name)
        if known and known.platform == "tpu" and count > 0 and len(shape) == len(next(iter(_CLOUD[name].values()))):
            _check_topology(text, name, shape)
            return Slice(known, shape, count)
    if match := re.fullmatch(r"(?:(\d+)\*)?(v\w+)-(\d+)", text):
        shapes, name = _CLOUD.get(match[2]), match[2].replace("litepod", "e")
        if shapes and int(match[1] or 1) > 0:
            if int(match[3]) not in shapes:
                sizes = ", ".join(f"{match[2]}-{size}" for size in shapes)
                raise UserError(f"slice {text!r} is unknown; there are: {sizes}")
            return Slice(CHIPS[name], shapes[int(match[3])], int(match[1] or 1))
    if match := re.fullmatch(r"(\w+)x(\d+)", text):
        known, devices = CHIPS.get(match[1]), int(match[2])
        if known and known.platform == "gpu" and devices > 0:
            if devices > known.per_host and devices % known.per_host:
                raise UserError(f"slice {text!r}: hosts have {known.per_host} devices, {devices} is not a multiple")
            return Slice(known, (min(devices, known.per_host),), max(devices // known.per_host, 1))
    raise UserError(f"slice {text!r} is unknown; write it as one of {_FORMS}; chips: {', '.join(CHIPS)}")


def _check_topology(text: str, name: str, shape: tuple[int, ...]) -> None:
    """2D slices are those that the cloud names; a 3D slice of more than one cube is made of cubes of 4 x 4 x 4."""
    shapes = _CLOUD[name].values()
    cubes = len(shape) == 3 and all(size % 4 == 0 and size > 0 for size in shape)
    if shape not in shapes and not cubes:
        near = ", ".join(f"{name}:{'x'.join(map(str, known))}" for known in shapes)
        raise UserError(f"slice {text!r} cannot be had; there are: {near}")
