"""The decoder: a Llama-2 block as CT-LLM released it (arXiv 2404.04167, m-a-p/CT-LLM-Base), in Flax NNX.

Modules only declare parameters (shape, logical axes, initialisation) and the forward pass; values come from
`init_params`, which draws each one from its path in the tree, so any mesh gives the same bits. Layers are stacked
along a leading axis and scanned.

Legend: B batch, L length, T cache slots, D model width, N query heads, K key/value heads, H head size, F feed-forward
width, V vocabulary (padded), Y layers, S beginnings that rows share.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ctllm_jax.attention import attention, prefix
from ctllm_jax.attention.flash import LSE_NAME, OUTPUT_NAME
from ctllm_jax.kv_cache import Cache, put_heads, put_segments
from ctllm_jax.lora import NO_ADAPTERS, Adapters, ranks_in
from ctllm_jax.precision import wide
from ctllm_jax.products import head_logits, product
from ctllm_jax.rotary import RopeScaling, frequencies, rotate
from ctllm_jax.sharding import constrain

# What is kept of every layer for the backward pass besides its input, by the names given below; the rest is computed
# again. Each policy keeps more than the one before it, and takes less time.
_ATTENTION = (OUTPUT_NAME, LSE_NAME)
_QKV = (*_ATTENTION, "query", "key", "value")
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "attention": _ATTENTION,  # spares the attention kernel
    "qkv": _QKV,  # and the projections before it
    "gate": (*_QKV, "attention_residual", "gate"),  # and half of the feed-forward
    # No product is computed twice, except in cudnn, whose log-sum-exp has no name.
    "matmuls": (*_QKV, "attention_residual", "gate", "up"),
    "none": None,  # every activation
}


_SIZES = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "vocab_size", "max_length")
_DTYPES = ("bfloat16", "float32", "float64")  # the last to tell what is the same from what rounds alike: `precision`


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and numerics. The values of CT-LLM-2B stand in configs/models.py."""

    num_layers: int  # [layers] blocks of attention and feed-forward
    d_model: int  # [features] width of the residual stream
    num_heads: int  # [heads] of queries
    num_kv_heads: int  # [heads] of keys and values; fewer than num_heads is GQA
    head_dim: int  # [features] of a head
    d_ff: int  # [features] width inside the SwiGLU
    vocab_size: int  # [ids] the tokenizer can give; logits of the padding beyond are masked
    padded_vocab_size: int  # [rows] of the embedding tables
    max_length: int  # [tokens] of a context
    norm_eps: float  # [1] added to the mean square in RMSNorm
    rope_theta: float  # [1] base of the rotary frequencies
    rope_scaling: RopeScaling | None  # for contexts longer than trained; None: none
    tie_embeddings: bool  # the output head is the input embedding
    qk_norm: bool  # RMSNorm over the head size on queries and keys
    init_std: float  # [1] standard deviation of initial weights
    dtype: str  # activations and matmuls: "bfloat16" or "float32"
    param_dtype: str  # of the parameters: "float32" or "bfloat16"
    remat: str  # what the backward pass keeps of a layer: a key of REMAT_POLICIES
    attention: str  # backend: a key of ctllm_jax.attention.BACKENDS

    def __post_init__(self):
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        for name in (self.dtype, self.param_dtype):
            if name not in _DTYPES:
                raise ValueError(f"dtype {name!r} is unknown; there are: {', '.join(_DTYPES)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even (rotary embedding)")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r} is unknown; there are: {', '.join(REMAT_POLICIES)}")


def _param(cfg: ModelConfig, shape: tuple[int, ...], axes: tuple[str | None, ...], init: float | str) -> nnx.Param:
    """Declares a parameter; `init` is a normal's standard deviation or "ones"."""
    assert len(shape) == len(axes)
    return nnx.Param(jnp.zeros(shape, cfg.param_dtype), axes=axes, init=init)


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, computed in fp32 (fp64 for fp64)."""
    x_wide = x.astype(wide(x.dtype))
    y = x_wide * jax.lax.rsqrt(jnp.mean(x_wide * x_wide, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(x_wide.dtype)).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm attention and SwiGLU; every parameter has a leading axis of Y layers."""

    def __init__(self, cfg: ModelConfig, ranks: Mapping[str, int]):
        Y, D, N, K, H, F = (
            cfg.num_layers,
            cfg.d_model,
            cfg.num_heads,
            cfg.num_kv_heads,
            cfg.head_dim,
            cfg.d_ff,
        )
        std, out_std = cfg.init_std, cfg.init_std / (2 * Y) ** 0.5  # outputs scaled down as Megatron does
        self.cfg = cfg
        self.attention_norm = _param(cfg, (Y, D), ("layers", None), "ones")
        self.q = _param(cfg, (Y, D, N, H), ("layers", "embed", "heads", None), std)
        self.k = _param(cfg, (Y, D, K, H), ("layers", "embed", "kv_heads", None), std)
        self.v = _param(cfg, (Y, D, K, H), ("layers", "embed", "kv_heads", None), std)
        self.out = _param(cfg, (Y, N, H, D), ("layers", "heads", None, "embed"), out_std)
        if cfg.qk_norm:
            self.q_norm = _param(cfg, (Y, H), ("layers", None), "ones")
            self.k_norm = _param(cfg, (Y, H), ("layers", None), "ones")
        self.mlp_norm = _param(cfg, (Y, D), ("layers", None), "ones")
        self.gate = _param(cfg, (Y, D, F), ("layers", "embed", "mlp"), std)
        self.up = _param(cfg, (Y, D, F), ("layers", "embed", "mlp"), std)
        self.down = _param(cfg, (Y, F, D), ("layers", "mlp", "embed"), out_std)
        if ranks:
            self.adapters = Adapters(self, ranks)

    def _product(self, equation: str, x: jax.Array, name: str) -> jax.Array:
        """x times a matrix, and what the matrix's adapter adds where it has one."""
        y = product(equation, x, getattr(self, name)[...].astype(x.dtype))
        adapter = getattr(getattr(self, "adapters", None), name, None)
        return y if adapter is None else y + adapter(x)

    def __call__(self, x_BLD, positions_BL, attend):
        """One layer, whose parameters are sliced already: (x_BLD, keys and values of all layers).

        `attend` takes queries, keys and values, and returns (mixed values, keys and values of all layers).
        """
        cfg = self.cfg
        y_BLD = _rms_norm(x_BLD, self.attention_norm[...], cfg.norm_eps)
        q_BLNH = self._product("BLD,DNH->BLNH", y_BLD, "q")
        k_BLKH = self._product("BLD,DKH->BLKH", y_BLD, "k")
        v_BLKH = self._product("BLD,DKH->BLKH", y_BLD, "v")
        if cfg.qk_norm:
            q_BLNH = _rms_norm(q_BLNH, self.q_norm[...], cfg.norm_eps)
            k_BLKH = _rms_norm(k_BLKH, self.k_norm[...], cfg.norm_eps)
        frequency = frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        q_BLNH = constrain(rotate(q_BLNH, positions_BL, frequency), "batch", "length", "heads", None)
        k_BLKH = constrain(rotate(k_BLKH, positions_BL, frequency), "batch", "length", "kv_heads", None)
        q_BLNH, k_BLKH = checkpoint_name(q_BLNH, "query"), checkpoint_name(k_BLKH, "key")
        v_BLKH = checkpoint_name(v_BLKH, "value")
        o_BLNH, kv_YBKTH = attend(q_BLNH, k_BLKH, v_BLKH)
        x_BLD = x_BLD + self._product("BLNH,NHD->BLD", o_BLNH, "out")
        x_BLD = checkpoint_name(constrain(x_BLD, "batch", "length", None), "attention_residual")
        y_BLD = _rms_norm(x_BLD, self.mlp_norm[...], cfg.norm_eps)
        gate_BLF = checkpoint_name(self._product("BLD,DF->BLF", y_BLD, "gate"), "gate")
        up_BLF = checkpoint_name(self._product("BLD,DF->BLF", y_BLD, "up"), "up")
        hidden_BLF = constrain(jax.nn.silu(gate_BLF) * up_BLF, "batch", "length", "mlp")
        x_BLD = x_BLD + self._product("BLF,FD->BLD", hidden_BLF, "down")
        return constrain(x_BLD, "batch", "length", None), kv_YBKTH


def _attending(cfg: ModelConfig, segments_BL: jax.Array, cache: Cache | None, owner_B) -> Callable:
    """How a layer attends: a function of (keys and values of all layers or None, the layer's number, queries, keys,
    values) that returns (mixed values, keys and values of all layers).

    Where tokens are appended to the cache, its segments have theirs already.
    """

    def alone(kv_YBKTH, layer, q_BLNH, k_BLKH, v_BLKH):
        return attention(q_BLNH, k_BLKH, v_BLKH, segments_BL, segments_BL, backend=cfg.attention), kv_YBKTH

    def appended(kv_YBKTH, layer, q_BLNH, k_BLKH, v_BLKH):
        kv_YBKTH = tuple(
            put_heads(old, new, layer, cache.length) for old, new in zip(kv_YBKTH, (k_BLKH, v_BLKH), strict=True)
        )
        arrays = q_BLNH, *(whole[layer].swapaxes(1, 2) for whole in kv_YBKTH), segments_BL, cache.segments_BT
        return attention(*arrays, q_offset=cache.length, backend=cfg.attention), kv_YBKTH

    def beside(kv_YSKPH, layer, q_BLNH, k_BLKH, v_BLKH):
        k_SKPH, v_SKPH = (whole[layer] for whole in kv_YSKPH)
        found = prefix.attention(q_BLNH, k_BLKH, v_BLKH, segments_BL, k_SKPH, v_SKPH, cache.segments_BT, owner_B)
        return found, kv_YSKPH

    if cache is None:
        return alone
    return appended if owner_B is None else beside


class Transformer(nnx.Module):
    """The whole decoder. Use through `init_params`, `forward` and `decode`."""

    def __init__(self, cfg: ModelConfig, ranks: Mapping[str, int] = NO_ADAPTERS):
        """`ranks`: of the LoRA adapters of the layers' matrices, by name."""
        self.cfg = cfg
        V, D = cfg.padded_vocab_size, cfg.d_model
        self.embed = _param(cfg, (V, D), ("vocab", "embed"), cfg.init_std)
        self.layers = Block(cfg, ranks)
        self.final_norm = _param(cfg, (D,), (None,), "ones")
        if not cfg.tie_embeddings:
            self.head = _param(cfg, (D, V), ("embed", "vocab"), cfg.init_std)

    def hidden_states(
        self, tokens_BL, positions_BL, segments_BL, cache: Cache | None = None, owner_B: jax.Array | None = None
    ):
        """Returns (normalised x_BLD that the head reads, the cache afterwards: see `forward`)."""
        cfg = self.cfg
        x_BLD = self.embed[...].astype(cfg.dtype)[tokens_BL]
        x_BLD = constrain(x_BLD, "batch", "length", None)
        graph, layers_Y = nnx.split(self.layers)
        kv_YBKTH, numbers_Y, appends = None, None, cache is not None and owner_B is None
        if cache is not None:
            kv_YBKTH, numbers_Y = (cache.k_YBKTH, cache.v_YBKTH), jnp.arange(cfg.num_layers, dtype=jnp.int32)
        if appends:
            segments_BT = put_segments(cache.segments_BT, segments_BL, cache.length)
            cache = dataclasses.replace(cache, segments_BT=segments_BT)
        attend = _attending(cfg, segments_BL, cache, owner_B)

        def layer(carried, inputs):
            (x_BLD, kv_YBKTH), (params, number) = carried, inputs
            return nnx.merge(graph, params)(x_BLD, positions_BL, functools.partial(attend, kv_YBKTH, number)), None

        kept = REMAT_POLICIES[cfg.remat]
        if kept is not None:
            policy = jax.checkpoint_policies.save_only_these_names(*kept)
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        (x_BLD, kv_YBKTH), _ = jax.lax.scan(layer, (x_BLD, kv_YBKTH), (layers_Y, numbers_Y))
        x_BLD = _rms_norm(x_BLD, self.final_norm[...], cfg.norm_eps)
        if appends:
            cache = Cache(*kv_YBKTH, cache.segments_BT, cache.length + tokens_BL.shape[1])
        return x_BLD, cache

    def __call__(
        self, tokens_BL, positions_BL, segments_BL, cache: Cache | None = None, owner_B: jax.Array | None = None
    ):
        """Returns (logits_BLV in fp32 with padded ids at -inf, the cache afterwards: see `forward`)."""
        cfg = self.cfg
        x_BLD, cache = self.hidden_states(tokens_BL, positions_BL, segments_BL, cache, owner_B)
        head_DV = self.embed[...].T if cfg.tie_embeddings else self.head[...]
        logits_BLV = constrain(head_logits(x_BLD, head_DV), "batch", "length", "vocab")
        if cfg.vocab_size < cfg.padded_vocab_size:
            # The released model could sample ids that its tokenizer cannot decode; ours cannot.
            logits_BLV = jnp.where(jnp.arange(cfg.padded_vocab_size) < cfg.vocab_size, logits_BLV, -jnp.inf)
        return logits_BLV, cache


def _abstract(cfg: ModelConfig, ranks: Mapping[str, int]) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(cfg, ranks)))


def abstract_params(cfg: ModelConfig, ranks: Mapping[str, int] = NO_ADAPTERS) -> dict:
    """Nested dict of ShapeDtypeStructs: the form in which parameters are passed around, saved and converted.

    With `ranks` (see `Transformer`) LoRA's adapters are among them, see `ctllm_jax.lora`.
    """
    return nnx.to_pure_dict(_abstract(cfg, ranks)[1])


def as_read(cfg: ModelConfig) -> dict:
    """`abstract_params` as inference holds them: matrices in the compute dtype, to which every product rounds them
    anyway. Scales of norms, which are read in fp32, and what is smaller already keep their dtype."""

    def narrowed(leaf: jax.ShapeDtypeStruct, init: float | str) -> jax.ShapeDtypeStruct:
        narrower = init != "ones" and jnp.dtype(cfg.dtype).itemsize < leaf.dtype.itemsize
        return leaf.update(dtype=jnp.dtype(cfg.dtype)) if narrower else leaf

    return jax.tree.map(narrowed, abstract_params(cfg), _metadata(cfg, NO_ADAPTERS, "init"))


def logical_axes(cfg: ModelConfig, ranks: Mapping[str, int] = NO_ADAPTERS) -> dict:
    """Nested dict like `abstract_params`, with each parameter's logical axis names."""
    return _metadata(cfg, ranks, "axes")


def _metadata(cfg: ModelConfig, ranks: Mapping[str, int], name: str) -> dict:
    tree: dict = {}
    for path, leaf in nnx.to_flat_state(_abstract(cfg, ranks)[1]):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf.get_metadata()[name]
    return tree


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """The standard normal's 65,536 quantiles (i + 1/2) / 65,536, fp32; the outermost are at 4.3 deviations."""
    return scipy.special.ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32)


def init_params(cfg: ModelConfig, key: jax.Array, ranks: Mapping[str, int] = NO_ADAPTERS) -> dict:
    """Draws every parameter: normal with its declared deviation, from `key` folded with the parameter's path.

    Sixteen random bits choose a quantile from a table: `jax.random.normal` computes it instead, and the compiler's
    roundings then depend on how an array is cut (seen: one ulp between 1 and 8 CPU devices, jax 0.12).
    """

    def draw(path, leaf, init):
        if init == "ones":
            return jnp.ones(leaf.shape, leaf.dtype)
        name = "/".join(entry.key for entry in path)
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        bits = jax.random.bits(own_key, leaf.shape, jnp.uint16)
        return (init * jnp.asarray(_normal_quantiles())[bits]).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg, ranks), _metadata(cfg, ranks, "init"))


def forward(
    cfg: ModelConfig,
    params: dict,
    tokens_BL: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    cache: Cache | None = None,
    owner_B: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None]:
    """The forward pass as a pure function of the parameters.

    Args:
      cfg: the architecture.
      params: nested dict as `init_params` gives it; adapters in it are used.
      tokens_BL: int32 ids.
      positions_BL: int32 position of each token within its document.
      segments_BL: int32 document of each token; tokens see only their own; 0 is padding.
      cache: keys and values of earlier tokens; the tokens are appended to it.
      owner_B: which row of the cache each row goes on from. Then the cache's S rows are beginnings that rows share,
        seen by all segments, and stay as they are.

    Returns:
      (logits_BLV fp32, the cache with the tokens, or as it was where rows share it; None without one).
    """
    return _module(cfg, params)(tokens_BL, positions_BL, segments_BL, cache, owner_B)


def hidden_states(
    cfg: ModelConfig, params: dict, tokens_BL: jax.Array, positions_BL: jax.Array, segments_BL: jax.Array
) -> jax.Array:
    """`forward` up to the head: normalised hidden states [B, L, D] in the compute dtype, whose product with `head` in
    that dtype, added up in fp32, are the logits."""
    return _module(cfg, params).hidden_states(tokens_BL, positions_BL, segments_BL)[0]


def head(cfg: ModelConfig, params: dict) -> jax.Array:
    """The output embedding [D, V], in the parameters' dtype."""
    return params["embed"].T if cfg.tie_embeddings else params["head"]


def _module(cfg: ModelConfig, params: dict) -> Transformer:
    graph, state = _abstract(cfg, ranks_in(params))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def init_cache(cfg: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens, in the compute dtype."""
    shape = (cfg.num_layers, batch, cfg.num_kv_heads, slots, cfg.head_dim)
    axes = ("layers", "batch", "kv_heads", None, None)
    return Cache(
        k_YBKTH=constrain(jnp.zeros(shape, cfg.dtype), *axes),
        v_YBKTH=constrain(jnp.zeros(shape, cfg.dtype), *axes),
        segments_BT=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.int32(0),
    )


def count_params(cfg: ModelConfig, ranks: Mapping[str, int] = NO_ADAPTERS) -> int:
    """Number of parameters, counted from the arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg, ranks)))


def flops_per_token(cfg: ModelConfig, length: int, causal: bool, adapters: int = 0) -> float:
    """Model FLOPs of one training token (forward and backward, no recomputation).

    6 per matmul parameter (the embedding look-up is none), plus 12 x layers x heads x head size x length for scores
    and mixing; `causal` halves the latter (only the visible half), the other convention counts the full square.
    With `adapters`, as many of LoRA's parameters alone are trained: the others have no gradient and take 4.
    """
    N, H, Y, D = cfg.num_heads, cfg.head_dim, cfg.num_layers, cfg.d_model
    per_layer = D * H * (2 * N + 2 * cfg.num_kv_heads) + 3 * D * cfg.d_ff
    matmul = Y * per_layer + D * cfg.padded_vocab_size
    products = 4.0 * matmul + 6.0 * adapters if adapters else 6.0 * matmul
    return products + (6.0 if causal else 12.0) * Y * N * H * length
