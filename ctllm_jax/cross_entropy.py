"""Log-probabilities of labels without ever holding [tokens, vocabulary]: the head is gone through in chunks of ids.

The vocabulary is cut, not the tokens: each chunk's share of the head's gradient is then final, written once and, under
FSDP, reduced once; only the hidden states' gradient, far smaller, is added to from chunk to chunk. The backward pass
computes every chunk's logits again, so a step spends 8 instead of 6 FLOPs per token and parameter of the head.

Legend: B sequences, L positions, T tokens of a device, D model width, V vocabulary (padded), C ids of a chunk.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from ctllm_jax.common.errors import UserError
from ctllm_jax.hardware import Chip
from ctllm_jax.precision import wide
from ctllm_jax.sharding import RULES, devices_over, spec

FORMS = ("dense", "chunked", "auto")
CHUNK = 2048  # ids: with fewer, adding to the hidden states' gradient costs time; with more, logits cost memory
DENSE_SHARE = 0.25  # of a device's memory: what the dense form may take before "auto" leaves it
UNKNOWN_MEMORY = 16 << 30  # bytes, of a device that is not in the table of chips


# ---- Which form


def dense_bytes(tokens: int, vocab: int) -> int:
    """Bytes of fp32 logits and their gradient, which the dense form holds at once.

    What a compiler takes in all differs by chip and mesh: a rule of choice, no forecast.
    """
    return 2 * 4 * tokens * vocab


def choose_form(form: str, tokens: int, vocab: int, mesh_shape: Mapping[str, int], chip: Chip | None) -> str:
    """The form that a loss takes: "dense" or "chunked".

    Args:
      form: one of FORMS. "auto" is the dense form, the faster one, while it takes at most DENSE_SHARE of a device.
      tokens: tokens that go through the loss at once, over all devices.
      vocab: padded vocabulary.
      mesh_shape: devices along each mesh axis; empty for one device.
      chip: what the device is, if that is known.
    """
    if form != "auto":
        return form
    token_ways, vocab_ways = devices_over(mesh_shape, "batch", "length"), devices_over(mesh_shape, "vocab")
    limit = DENSE_SHARE * (chip.memory if chip else UNKNOWN_MEMORY)
    return "dense" if dense_bytes(tokens // token_ways, vocab // vocab_ways) <= limit else "chunked"


# ---- The chunked form


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def label_logprobs(
    x_BLD: jax.Array, head_DV: jax.Array, labels_BL: jax.Array, vocab_size: int, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """What `losses.token_logprobs` gives for the logits x @ head, in memory of [tokens, chunk].

    Under `jax.set_mesh` tokens, head and vocabulary lie as `sharding.RULES` says: the head is gathered over its
    width once, in the dtype of x, and kept for the backward pass; its gradient is reduced once, in fp32.

    Args:
      x_BLD: hidden states; their dtype is that of the matmuls, which add up in fp32.
      head_DV: the output embedding in any dtype; its gradient is never rounded below it.
      labels_BL: int32 ids in [0, vocab_size).
      vocab_size: ids beyond are padding and have no probability.
      chunk: ids that a device takes at a time; the last chunk may be smaller.

    Returns:
      (log-probability of each label, log-sum-exp of each position), both fp32 [B, L]; differentiable in x and head.

    Raises:
      UserError: rows or positions do not divide over the mesh.
    """
    return _forward(x_BLD, head_DV, labels_BL, vocab_size, chunk)[0]


def _forward(x_BLD, head_DV, labels_BL, vocab_size, chunk):
    layout = _layout(x_BLD.shape)

    def local(x_BLD, head_DV, labels_BL):
        if layout.embed:
            head_DV = lax.all_gather(head_DV.astype(x_BLD.dtype), layout.embed, axis=0, tiled=True)
        x_TD, labels_T = x_BLD.reshape(-1, x_BLD.shape[-1]), labels_BL.reshape(-1)
        first = _first_id(layout, head_DV)

        def step(carry, start, size):
            top_T, sum_T, label_T = carry
            _, logits_TC, ids_C = _chunk_logits(x_TD, head_DV, start, size, first, vocab_size)
            new_T = jnp.maximum(top_T, jnp.max(logits_TC, axis=-1))
            sum_T = sum_T * jnp.exp(top_T - new_T) + jnp.sum(jnp.exp(logits_TC - new_T[:, None]), axis=-1)
            label_T += jnp.sum(jnp.where(ids_C == labels_T[:, None], logits_TC, 0), axis=-1)
            return new_T, sum_T, label_T

        zeros_T = jnp.zeros(labels_T.shape, wide(x_TD.dtype))
        # The lowest finite number: a chunk of padding alone must not give -inf - -inf.
        start = (zeros_T + jnp.finfo(zeros_T.dtype).min, zeros_T, zeros_T)
        own_T, sum_T, label_T = _over_chunks(step, start, head_DV.shape[1], chunk)
        top_T = lax.pmax(own_T, layout.vocab) if layout.vocab else own_T
        sum_T, label_T = (_psum(value, layout.vocab) for value in (sum_T * jnp.exp(own_T - top_T), label_T))
        lse_T = top_T + jnp.log(sum_T)
        return (label_T - lse_T).reshape(labels_BL.shape), lse_T.reshape(labels_BL.shape), head_DV

    tokens = layout.spec("batch", "length")
    logprob_BL, lse_BL, kept_DV = layout.map(
        local,
        in_specs=(layout.spec("batch", "length", None), layout.spec("embed", "vocab"), tokens),
        out_specs=(tokens, tokens, layout.spec(None, "vocab")),
    )(x_BLD, head_DV, labels_BL)
    # An empty array carries the head's own dtype to the backward pass.
    return (logprob_BL, lse_BL), (x_BLD, kept_DV, labels_BL, lse_BL, jnp.zeros(0, head_DV.dtype))


def _backward(vocab_size, chunk, residuals, cotangents):
    """With p the softmax of a chunk and e its one-hot labels: dlogits = p (dlse - dlogprob) + e dlogprob."""
    x_BLD, head_DV, labels_BL, lse_BL, like = residuals
    layout = _layout(x_BLD.shape)

    def local(x_BLD, head_DV, labels_BL, lse_BL, dlogprob_BL, dlse_BL):
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        labels_T1, lse_T1, dlogprob_T1, dlse_T1 = (
            array.reshape(-1, 1) for array in (labels_BL, lse_BL, dlogprob_BL, dlse_BL)
        )
        first = _first_id(layout, head_DV)

        def step(carry, start, size):
            dx_TD, dhead_DV = carry
            head_DC, logits_TC, ids_C = _chunk_logits(x_TD, head_DV, start, size, first, vocab_size)
            dlogits_TC = jnp.exp(logits_TC - lse_T1) * (dlse_T1 - dlogprob_T1)
            dlogits_TC += jnp.where(ids_C == labels_T1, dlogprob_T1, 0)
            dlogits_TC = dlogits_TC.astype(x_TD.dtype)  # as `model` does in the dense form
            dx_TD += jnp.einsum("TC,DC->TD", dlogits_TC, head_DC, preferred_element_type=wide(x_TD.dtype))
            dhead_DC = jnp.einsum("TD,TC->DC", x_TD, dlogits_TC, preferred_element_type=wide(x_TD.dtype))
            dhead_DC = _reduce_head(dhead_DC, layout).astype(like.dtype)
            return dx_TD, lax.dynamic_update_slice_in_dim(dhead_DV, dhead_DC, start, axis=1)

        own_width = head_DV.shape[0] // devices_over(layout.sizes, "embed")
        dx_TD = jnp.zeros(x_TD.shape, wide(x_TD.dtype))
        dhead_DV = lax.empty((own_width, head_DV.shape[1]), like.dtype)  # every chunk writes its part
        dx_TD, dhead_DV = _over_chunks(step, (dx_TD, dhead_DV), head_DV.shape[1], chunk)
        return _psum(dx_TD, layout.vocab).astype(x_BLD.dtype).reshape(x_BLD.shape), dhead_DV

    hidden, tokens = layout.spec("batch", "length", None), layout.spec("batch", "length")
    dx_BLD, dhead_DV = layout.map(
        local,
        in_specs=(hidden, layout.spec(None, "vocab"), tokens, tokens, tokens, tokens),
        out_specs=(hidden, layout.spec("embed", "vocab")),
    )(x_BLD, head_DV, labels_BL, lse_BL, *cotangents)
    return dx_BLD, dhead_DV, None


label_logprobs.defvjp(_forward, _backward)


def _chunk_logits(x_TD, head_DV, start, size, first, vocab_size):
    """(the chunk of the head as the matmul takes it, its fp32 logits, its ids); the device's first id is `first`."""
    head_DC = lax.dynamic_slice_in_dim(head_DV, start, size, axis=1).astype(x_TD.dtype)
    logits_TC = jnp.einsum("TD,DC->TC", x_TD, head_DC, preferred_element_type=wide(x_TD.dtype))
    ids_C = first + start + jnp.arange(size)
    return head_DC, jnp.where(ids_C < vocab_size, logits_TC, -jnp.inf), ids_C


def _over_chunks(step, carry, vocab: int, chunk: int):
    """Folds step(carry, start, size) over the ids [0, vocab): a scan of whole chunks, then what is left."""
    chunk = min(chunk, vocab)
    whole, rest = divmod(vocab, chunk)
    carry, _ = lax.scan(lambda carry, index: (step(carry, index * chunk, chunk), None), carry, jnp.arange(whole))
    return step(carry, whole * chunk, rest) if rest else carry


# ---- Over a mesh


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Mesh axes, of more than one device, that tokens, vocabulary and the head's width lie over."""

    sizes: Mapping[str, int]  # of all axes; empty without a mesh
    tokens: tuple[str, ...]
    vocab: tuple[str, ...]
    embed: tuple[str, ...]

    def spec(self, *axes: str | None):
        return spec(axes) if self.sizes else None

    def map(self, function, in_specs, out_specs):
        """`function` on every device's part; without a mesh, the function itself."""
        if not self.sizes:
            return function
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _layout(shape: tuple[int, ...]) -> _Layout:
    """The layout of hidden states of this shape under the mesh that is set."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    for what, size, axis in (("rows", shape[0], "batch"), ("positions", shape[1], "length")):
        if size % (ways := devices_over(sizes, axis)):
            raise UserError(
                f"chunked cross-entropy: {size} {what} at a time do not divide over {ways} devices "
                f"(mesh axes {' x '.join(RULES[axis])}); take fewer microbatches or another mesh"
            )

    def used(*axes: str) -> tuple[str, ...]:
        return tuple(name for axis in axes for name in RULES[axis] if sizes.get(name, 1) > 1)

    return _Layout(sizes, used("batch", "length"), used("vocab"), used("embed"))


def _first_id(layout: _Layout, head_DV: jax.Array):
    """The first id of this device's part of the vocabulary."""
    return lax.axis_index(layout.vocab) * head_DV.shape[1] if layout.vocab else 0


def _psum(value, axes: tuple[str, ...]):
    return lax.psum(value, axes) if axes else value


def _reduce_head(dhead_DC: jax.Array, layout: _Layout) -> jax.Array:
    """The sum over all tokens of a chunk's gradient; of its width, the part that this device keeps."""
    dhead_DC = _psum(dhead_DC, tuple(axis for axis in layout.tokens if axis not in layout.embed))
    return lax.psum_scatter(dhead_DC, layout.embed, scatter_dimension=0, tiled=True) if layout.embed else dhead_DC
