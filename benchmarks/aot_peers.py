"""The 2B step of a shipped config, one microbatch, with our attention kernels or jax's. Run by aot.py."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
from aot_cases import FLASH_BLOCKS, one_microbatch
from jax.experimental.pallas.ops.tpu import flash_attention, splash_attention

from ctllm_jax import model
from ctllm_jax.attention import sharded
from ctllm_jax.attention.flash import OUTPUT_NAME
from ctllm_jax.hardware import parse_slice
from ctllm_jax.plan import compile as ahead


def flash(chip, q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT, *, q_offset):
    """jax's flash attention as its users call it, with the blocks of `FLASH_BLOCKS`."""
    heads = [jnp.swapaxes(x, 1, 2) for x in (q_BLNH, k_BTKH, v_BTKH)]
    forward, dq, dkv = (FLASH_BLOCKS[chip][kernel] for kernel in ("forward", "dq", "dkv"))
    blocks = flash_attention.BlockSizes(
        block_q=forward[0], block_k_major=forward[1], block_k=forward[2], block_b=1,
        block_q_dq=dq[0], block_k_major_dq=dq[1], block_k_dq=dq[2],
        block_k_major_dkv=dkv[0], block_k_dkv=dkv[0], block_q_major_dkv=dkv[1], block_q_dkv=dkv[2],
    )  # fmt: skip
    out_BNLH = flash_attention.flash_attention(
        *heads,
        segment_ids=flash_attention.SegmentIds(q=q_segments_BL, kv=kv_segments_BT),
        causal=True,
        sm_scale=q_BLNH.shape[-1] ** -0.5,
        block_sizes=blocks,
    )
    return jnp.swapaxes(out_BNLH, 1, 2)


def splash(chip, q_BLNH, k_BTKH, v_BTKH, q_segments_BL, kv_segments_BT, *, q_offset):
    """jax's splash attention, blocks of 1024 and 512, which every generation takes."""
    L, N, H = q_BLNH.shape[1:]
    sizes = splash_attention.BlockSizes(
        block_q=1024, block_kv=1024, block_kv_compute=512, block_q_dkv=1024, block_kv_dkv=1024,
        block_kv_dkv_compute=512, block_q_dq=1024, block_kv_dq=1024,
    )  # fmt: skip
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((L, L))] * N)
    kernel = splash_attention.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name=OUTPUT_NAME
    )
    heads = [jnp.swapaxes(x, 1, 2) for x in (q_BLNH * H**-0.5, k_BTKH, v_BTKH)]
    segments = splash_attention.SegmentIds(q=q_segments_BL, kv=kv_segments_BT)
    return jnp.swapaxes(jax.vmap(kernel)(*heads, segments), 1, 2)


KERNELS = {"jax flash": flash, "jax splash": splash}


def main() -> None:
    """Prints what the compiler says as the last line."""
    request = json.loads(sys.argv[1])
    config, target = one_microbatch(request["slice"]), parse_slice(request["slice"])
    if request["kernel"] in KERNELS:
        kernel = functools.partial(KERNELS[request["kernel"]], target.chip.name)
        model.attention = lambda *arrays, q_offset, backend: sharded.attention(kernel, *arrays)
    found = ahead.compile_step(config, target)
    if found.refusal:
        sys.exit(found.refusal)
    print(json.dumps({**dataclasses.asdict(found), "seconds": found.cycles / target.chip.clock}))


if __name__ == "__main__":
    main()
