"""How the 2B model lies on the usual slices: mesh, microbatches of CT-LLM's batch of 512 rows, compiler options.

    ctllm plan --config=configs/pretrain.py:ct_llm_2b@v5e:16x16 --slice=v5e:16x16

prints what each takes; docs/plans.md has them all. Parameters lie over all devices of a TPU slice or GPU host; several
slices or hosts are replicas that add their gradients. A device takes as many rows at a time as let it keep every
product for the backward pass (remat `matmuls`). None of them has run as it stands; docs/profiles.md says what has.
"""

from ml_collections import ConfigDict

# XLA may split a product into pieces to send weights while it multiplies; with the small pieces of a layer of this size
# the compiler's own estimate of the step more than doubles (v5e:4x4), so weights are gathered whole, ahead of use.
_TPU = dict(xla_jf_spmd_threshold_for_windowed_einsum_mib="1000000")


def _tpu(fsdp: int, microbatches: int, slices: int = 1) -> dict:
    return dict(
        mesh=dict(slice=slices, fsdp=fsdp), microbatches=microbatches, attention="pallas_tpu", xla_options=dict(_TPU)
    )


def _gpu(hosts: int, microbatches: int, devices: int = 8) -> dict:
    mesh = dict(slice=hosts, fsdp=devices)
    return dict(mesh=mesh, microbatches=microbatches, attention="pallas_gpu", xla_options={})


SLICES = {
    "v4:4x4x4": _tpu(64, 4),
    "v5e:4x4": _tpu(16, 32),
    "v5e:8x8": _tpu(64, 8),
    "v5e:16x16": _tpu(256, 2),
    "2*v5e:16x16": _tpu(256, 1, slices=2),
    "v5p:2x2x4": _tpu(16, 4),
    "v5p:4x4x4": _tpu(64, 1),
    "v5p:4x8x8": _tpu(256, 1),
    "v6e:4x4": _tpu(16, 32),
    "v6e:8x8": _tpu(64, 8),
    "v6e:16x16": _tpu(256, 2),
    "a100x1": _gpu(1, 256, devices=1),
    "a100x8": _gpu(1, 8),
    "a100x64": _gpu(8, 1),
    "h100x1": _gpu(1, 256, devices=1),
    "h100x8": _gpu(1, 8),
    "h100x64": _gpu(8, 1),
    "h100x256": _gpu(32, 1),
    "h200x1": _gpu(1, 64, devices=1),
    "h200x8": _gpu(1, 4),
    "h200x64": _gpu(8, 1),
    "h200x256": _gpu(32, 1),
}


def lay_out(config: ConfigDict, name: str) -> None:
    """Sets what the slice `name` decides; ValueError naming the known ones."""
    if name not in SLICES:
        raise ValueError(f"there are no values for slice {name!r}; there are: {', '.join(SLICES)}")
    values = SLICES[name]
    config.mesh.update(values["mesh"])
    config.model.update(remat="matmuls", attention=values["attention"])
    config.microbatches = values["microbatches"]
    config.xla_options = ConfigDict(values["xla_options"])
