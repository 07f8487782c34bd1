"""What the flash-attention kernels share: tile sizes, the mask of a tile, and the list of tiles worth visiting.

Each kernel holds one block of rows (queries or keys) and walks over the blocks of the other side with a loop inside
the kernel, so that the same body is right for a TPU (Mosaic), where a grid runs in order and a whole side of one head
lies in VMEM, and for a GPU (Triton), where grid cells run at once and the whole side is a pointer. How far it walks is
worked out beforehand by XLA (`schedule`): tiles that causality or the segments mask entirely are never visited.

Legend: B batch, N query heads, L query length, T key length, H head size; within a kernel Q queries and S keys of one
tile; R rows held by a kernel, C columns walked over; 1 an axis of size one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

from ctllm_jax.attention.xla import MASKED

# MASKED lies below the running maximum's start, so its weight is exp(-5e29) = 0 even in a row that has seen
# nothing yet: such rows end with sum 0 and output 0, with no case of their own.
LOWEST_MAXIMUM = -5e29


# Scores are kept in units of log 2: a chip's exponential is 2^x, so exp would cost one more product per score.
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile, and the tiles in a turn of each loop that walks over tiles; all powers of two.

    A loop of large turns goes first and the last one takes single tiles. A TPU's compiler lays one tile's vector work
    under the next one's products only within a turn.
    """

    queries: int
    keys: int
    turns: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tile sizes of the three kernels for 16-bit inputs, and how they are compiled.

    On a TPU the whole other side of one head lies in VMEM (keys and values; in dkv queries and output gradients), which
    bounds the length: the compiler refuses what does not fit.
    """

    platform: str  # "tpu" or "gpu": which compiler the kernels are lowered for
    forward: Tile
    dq: Tile
    dkv: Tile
    vmem_bytes: int | None = None  # TPU: what a kernel may use of VMEM; None leaves the compiler's own limit
    row_bytes: int | None = None  # GPU: the widest row (head size x item size) that the tiles are meant for
    num_warps: int = 8  # GPU
    num_stages: int = 2  # GPU
    measured: str | None = None  # for plan.kernel_cycles: "causal" or "square", see `listed`

    @property
    def queries(self) -> int:
        """Query lengths are padded to a multiple of this."""
        return max(tile.queries for tile in (self.forward, self.dq, self.dkv))

    @property
    def keys(self) -> int:
        """Key lengths are padded to a multiple of this."""
        return max(tile.keys for tile in (self.forward, self.dq, self.dkv))

    def fitted(self, queries: int, keys: int, head_size: int, dtype: jnp.dtype) -> "Tiling":
        """For these lengths and inputs.

        No side of a tile exceeds the length rounded up to a power of two; fp32 halves both sides, as its products take
        more memory, and so does each doubling of a row beyond `row_bytes`; none falls below 128 on a TPU (its lanes) or
        16 on a GPU (its smallest matmul).
        """
        least = 128 if self.platform == "tpu" else 16
        itemsize = jnp.dtype(dtype).itemsize
        shrink = itemsize // 2
        if self.row_bytes:
            shrink *= max(head_size * itemsize // self.row_bytes, 1)

        def fit(size: int, length: int) -> int:
            return max(least, min(size // shrink, pl.next_power_of_2(length)))

        def fit_tile(tile: Tile) -> Tile:
            return Tile(fit(tile.queries, queries), fit(tile.keys, keys), tile.turns)

        return dataclasses.replace(self, forward=fit_tile(self.forward), dq=fit_tile(self.dq), dkv=fit_tile(self.dkv))


def padded(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros at the end of axis 1, up to a multiple: segment 0, which nothing sees."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _segment_range(segments_BX: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest segment of each block, padding left out: (beyond every id, 0) for a block of padding."""
    blocks = segments_BX.reshape(segments_BX.shape[0], -1, block)
    lowest = jnp.min(jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max), axis=-1)
    return lowest, jnp.max(blocks, axis=-1)


def schedule(
    q_segments_BL: jax.Array, kv_segments_BT: jax.Array, q_offset: jax.Array, tile: Tile, *, rows: str
) -> jax.Array:
    """Which blocks each kernel instance walks over.

    Segment ids may stand in any order; where they ascend along the row, as packing lays them, the walk is short.

    Args:
      q_segments_BL: 0 is padding.
      kv_segments_BT: 0 is padding.
      q_offset: key slot of the first query.
      tile: the kernel's tile.
      rows: "queries" (forward, dq: a block of queries walks over keys) or "keys" (dkv: the other way).

    Returns:
      int32 [3, B, blocks]. For "queries": first, split, stop. Blocks first..split are wholly before the queries and
      need no causal mask, blocks split..stop cross the diagonal. For "keys" the two parts come in the other order:
      first..split cross the diagonal.
    """
    q_low, q_high = _segment_range(q_segments_BL, tile.queries)
    kv_low, kv_high = _segment_range(kv_segments_BT, tile.keys)
    shared = (q_low[:, :, None] <= kv_high[:, None, :]) & (kv_low[:, None, :] <= q_high[:, :, None])
    q_start = q_offset + tile.queries * jnp.arange(q_low.shape[1])[:, None]
    kv_start = tile.keys * jnp.arange(kv_low.shape[1])[None, :]
    visible = shared & (q_start + tile.queries - 1 >= kv_start)
    below_diagonal = q_start >= kv_start + tile.keys - 1
    if rows == "keys":
        visible, below_diagonal = jnp.swapaxes(visible, 1, 2), below_diagonal.T
    count = visible.shape[-1]
    seen = jnp.any(visible, axis=-1)
    first = jnp.argmax(visible, axis=-1)
    stop = jnp.where(seen, count - jnp.argmax(visible[..., ::-1], axis=-1), first)
    clear = jnp.sum(below_diagonal, axis=-1)[None]
    split = jnp.clip(clear if rows == "queries" else count - clear, first, stop)
    return jnp.stack([first, split, stop]).astype(jnp.int32)


def listed(
    schedule_ref: Any, b: jax.Array, x: jax.Array, tile: Tile, count: int, tiling: Tiling, *, rows: str
) -> tuple:
    """(first, split, stop) of `schedule` for block x of row b, which walks over `count` blocks.

    A measured kernel works them out from the program's place instead, which the compiler's static count follows, while
    it knows nothing of the schedule: "square" visits every tile and masks none as causal, "causal" is one document that
    fills the row, offset 0.
    """
    if tiling.measured == "square":
        return (0, count, count) if rows == "queries" else (0, 0, count)
    if tiling.measured == "causal":
        held, walked = (tile.queries, tile.keys) if rows == "queries" else (tile.keys, tile.queries)
        # Those that cross the diagonal.
        first, stop = _floor_div(x * held, walked), _floor_div((x + 1) * held - 1, walked) + 1
        return (0, first, stop) if rows == "queries" else (first, stop, count)
    return tuple(schedule_ref[n, b, x] for n in range(3))


def _floor_div(number: Any, power: int) -> Any:
    """`number // power` of a number that is not negative and a power of two, also inside a kernel."""
    if isinstance(number, int):
        return number // power
    return jax.lax.shift_right_logical(number, jnp.int32(power.bit_length() - 1))


def walk(step: Callable, carry: Any, bounds: tuple, *, rows: str, turns: tuple[int, ...], scratch: bool) -> Any:
    """Takes the tiles between `bounds` (see `listed`); returns what `step(index, carry, causal=)` carried through them.

    With `scratch`, what is carried lies in VMEM between turns: the compiler would put it there too, but copy it for
    every loop. That does not pay for columns, which fill one lane of 128.
    """
    if not scratch:
        return _walk(step, carry, bounds, rows, turns, jax.lax.fori_loop)
    leaves, structure = jax.tree.flatten(carry)

    def in_scratch(*refs):
        def write(carry):
            for ref, leaf in zip(refs, jax.tree.leaves(carry), strict=True):
                ref[...] = leaf

        def read():
            return structure.unflatten(ref[...] for ref in refs)

        def loop(start, stop, body, _):
            pl.loop(start, stop)(lambda number: write(body(number, read())))

        write(carry)
        _walk(step, None, bounds, rows, turns, loop)
        return read()

    return pl.run_scoped(in_scratch, *(pltpu.VMEM(leaf.shape, leaf.dtype) for leaf in leaves))


def _walk(step: Callable, carry: Any, bounds: tuple, rows: str, turns: tuple[int, ...], loop: Callable) -> Any:
    first, split, stop = bounds
    clear, crossing = ((first, split), (split, stop)) if rows == "queries" else ((split, stop), (first, split))
    at, end = clear
    for size in turns:
        count = _floor_div(end - at, size)
        if not (isinstance(count, int) and count == 0):
            carry = loop(0, count, functools.partial(_turn, step, at, size), carry)
        at = at + count * size
    at, end = crossing
    if end is at:  # "square"
        return carry
    return loop(at, end, functools.partial(step, causal=True), carry)


def _turn(step: Callable, at: jax.Array, size: int, number: jax.Array, carry: Any) -> Any:
    for index in range(size):
        carry = step(at + number * size + index, carry, causal=False)
    return carry


def lanes(tiling: Tiling) -> int:
    """Width of a column that is compared with a tile: on a TPU its 128 lanes, as spreading it there takes time."""
    return 128 if tiling.platform == "tpu" else 1


def column(segments_BX: jax.Array, tiling: Tiling) -> jax.Array:
    """Segments as columns [B, X, lanes] of equal entries, for `spread`."""
    return jnp.broadcast_to(segments_BX[:, :, None], (*segments_BX.shape, lanes(tiling)))


def spread(column_R: jax.Array, width: int) -> jax.Array:
    """A column of `lanes` equal entries, as wide as a tile; a column of one is left to broadcasting."""
    return column_R if column_R.shape[1] == 1 else jnp.tile(column_R, (1, width // column_R.shape[1]))


def query_ids(q_segments_BL: jax.Array) -> jax.Array:
    """Segments with padding at -1, so that a padding query equals no key, padding keys (0) included."""
    return jnp.where(q_segments_BL == 0, -1, q_segments_BL)


def matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over axis `contract[0]` of a and `contract[1]` of b, accumulated in fp32; fp32 inputs stay fp32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def mask(
    scores: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    q_slot: jax.Array,
    kv_slot: jax.Array,
    *,
    query_axis: int,
    causal: bool,
) -> jax.Array:
    """Masks a tile of scores, [Q, S] (query axis 0) or [S, Q] (query axis 1).

    The segment ids come with the other axis of size one, those of the queries from `query_ids`. The slots are those of
    the tile's first query and key.
    """
    visible = q_segments == kv_segments
    if causal:
        q_slots = q_slot + jax.lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
        kv_slots = kv_slot + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis)
        visible &= q_slots >= kv_slots
    return jnp.where(visible, scores, MASKED)


def offset(offset_ref: Any, tiling: Tiling) -> jax.Array | int:
    """Key slot of the first query."""
    return 0 if tiling.measured else offset_ref[0]


def scalars(tiling: Tiling) -> pl.BlockSpec:
    """The spec of a small integer array that every kernel instance reads from; none does that is measured."""
    if tiling.measured:
        return pl.BlockSpec(memory_space=pl.ANY)  # the profile of `plan.kernel_cycles` has no copies to SMEM
    return pl.BlockSpec(memory_space=pltpu.SMEM if tiling.platform == "tpu" else None)


def compiler_params(tiling: Tiling) -> Any:
    """Grid (batch, head, block of rows): no cell writes what another one reads."""
    if tiling.platform == "tpu":
        semantics = ("parallel", "parallel", "parallel")
        return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=tiling.vmem_bytes)
    return pltriton.CompilerParams(num_warps=tiling.num_warps, num_stages=tiling.num_stages)


def cost(q_BNLH: jax.Array, k_BKTH: jax.Array, matmuls: int) -> pl.CostEstimate:
    """What the compiler's scheduler is told: half the square, segments not counted."""
    B, N, L, H = q_BNLH.shape
    scores = B * N * L * k_BKTH.shape[2] / 2
    bytes_accessed = 2 * (q_BNLH.size * q_BNLH.dtype.itemsize + k_BKTH.size * k_BKTH.dtype.itemsize)
    return pl.CostEstimate(
        flops=int(2 * matmuls * scores * H), transcendentals=int(scores), bytes_accessed=bytes_accessed
    )
