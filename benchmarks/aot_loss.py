"""One form of the 2B head's loss with its gradient, compiled for a v5e chip. Run by aot.py."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ctllm_jax.cross_entropy import label_logprobs
from ctllm_jax.hardware import CHIPS, parse_slice
from ctllm_jax.losses import lm_loss, token_logprobs
from ctllm_jax.plan import hlo
from ctllm_jax.plan.compile import devices

TOKENS, WIDTH, VOCAB, PADDED = 4096, 2048, 125_696, 125_824


def dense(x_BLD: jax.Array, head_DV: jax.Array, labels_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As the model and the objective do it."""
    logits_BLV = jnp.einsum("BLD,DV->BLV", x_BLD, head_DV.astype(x_BLD.dtype), preferred_element_type=jnp.float32)
    return token_logprobs(jnp.where(jnp.arange(PADDED) < VOCAB, logits_BLV, -jnp.inf), labels_BL)


def main() -> None:
    """Prints bytes and estimated seconds as the last line."""
    forms = {"dense": dense, "chunked": functools.partial(label_logprobs, vocab_size=VOCAB)}
    form = forms[json.loads(sys.argv[1])["form"]]

    def step(x_BLD, head_DV, labels_BL, weights_BL):
        def objective(x_BLD, head_DV):
            return lm_loss(*form(x_BLD, head_DV, labels_BL), weights_BL, 0.0)[0]

        return jax.value_and_grad(objective, argnums=(0, 1))(x_BLD, head_DV)

    place = NamedSharding(Mesh(np.array(devices(parse_slice("v5e:2x2"))[:1]), ("x",)), PartitionSpec())
    shapes = (
        ((1, TOKENS, WIDTH), "bfloat16"),
        ((WIDTH, PADDED), "float32"),
        ((1, TOKENS), "int32"),
        ((1, TOKENS), "float32"),
    )
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    program = jax.jit(step).lower(*arguments).compile()
    seconds = hlo.totals(program.as_text()).cycles / CHIPS["v5e"].clock
    print(json.dumps({"temporary": program.memory_analysis().temp_size_in_bytes, "seconds": seconds}))


if __name__ == "__main__":
    main()
