"""Texts, token by token: beside Hugging Face's `generate` on this machine, and what compilers say of the 2B model.

    python benchmarks/decode.py [--quick] [--part PART] [--slice NAME ...]

texts     tokens per CPU second of 16 greedy continuations, ours and transformers', the same model, one core
compiled  a token of `ctllm serve` for all slots of the 2B model: memory of one device, time, and the floor

benchmarks/README.md says what is counted, and how.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import Cost, environment, finish, least, middle, peer, pin, table, take_turns
from evaluate import PEERS, drawn_model
from jax.sharding import NamedSharding

from configs.models import ct_llm_2b
from ctllm_jax.generate import generate
from ctllm_jax.hardware import GIB, Slice, parse_slice
from ctllm_jax.loading import LoadedModel
from ctllm_jax.model import ModelConfig, as_read, count_params, logical_axes
from ctllm_jax.plan import hlo
from ctllm_jax.plan.compile import ENVIRONMENT, devices, missing
from ctllm_jax.sampling import Options
from ctllm_jax.sharding import MeshConfig, make_mesh, shardings, spec
from ctllm_jax.slots import SlotState, decode_step

HERE = pathlib.Path(__file__).resolve().parent
PARTS = ("texts", "compiled")
PROMPTS, PROMPT, NEW = 16, 64, 128  # texts, tokens of a prompt, tokens that follow it
SLICES = ("v6e:1x1", "v5e:2x2", "h200x1")
SLOTS = 8  # of `ctllm serve`, each with the model's whole context


def main() -> None:
    """Runs the parts that are asked for and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, one slice")
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--slice", nargs="*", help="others than " + " ".join(SLICES))
    options = parser.parse_args()
    parts, figures = [options.part] if options.part else PARTS, {}
    if "compiled" in parts:
        os.environ.update(ENVIRONMENT)
        jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])
        figures |= compiled(options.slice or (SLICES[:1] if options.quick else SLICES))
    if "texts" in parts:
        pin()
        with tempfile.TemporaryDirectory() as scratch:
            figures |= texts(pathlib.Path(scratch), rounds=2 if options.quick else 5)
    finish(figures)


# ---- texts


class Ours:
    """Continues the prompts and keeps the ids."""

    def __init__(self, model: LoadedModel, prompts: list[list[int]]):
        self._model, self._prompts = model, prompts
        self.ids: list[list[int]] = []

    def __call__(self) -> Cost:
        wall, cpu = time.perf_counter(), time.process_time()
        self.ids = generate(self._model, self._prompts, max_tokens=NEW, stop_ids=())
        return Cost(time.process_time() - cpu, time.perf_counter() - wall)


def texts(scratch: pathlib.Path, rounds: int) -> dict:
    """Prints the table; returns its figures."""
    model = drawn_model(scratch)
    random = np.random.default_rng(0)
    prompts = random.integers(8, model.tokenizer.vocab_size, (PROMPTS, PROMPT)).tolist()
    (scratch / "prompts.json").write_text(json.dumps(prompts))
    ours = Ours(model, prompts)
    script, files = HERE / "transformers_texts.py", (scratch / "model", scratch / "prompts.json")
    with peer([environment("evaluate", PEERS), script, *files, NEW]) as theirs:
        contestants = {"ctllm-jax": ours, "transformers": theirs}
        for contestant in contestants.values():
            contestant()  # compiles
        costs = take_turns(contestants, rounds)
    count = PROMPTS * NEW
    same = float(np.mean(np.array(ours.ids) == np.array(theirs.found["ids"])))
    speed = {name: count / least(own) for name, own in costs.items()}
    table(
        f"{PROMPTS} texts of {NEW} tokens after {PROMPT}, {count_params(model.config):,} parameters, fp32; "
        f"jax {jax.__version__}, " + ", ".join(f"{name} {version}" for name, version in theirs.about.items()),
        ("", "tokens/CPU s", "median"),
        [(name, speed[name], count / middle(own)) for name, own in costs.items()],
    )
    print(f"{100 * same:.1f} % of the tokens are the same")
    ratio = speed["ctllm-jax"] / speed["transformers"]
    return {"decode_to_transformers_ratio": ratio, "decode_tokens_per_cpu_second": speed, "decode_same_tokens": same}


# ---- compiled


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step on one device: bytes held and needed besides, estimated seconds (None: the compiler says none),
    and the seconds that reading what is held takes at the memory's rate."""

    held: int
    temporary: int
    seconds: float | None
    floor: float


def compiled(names: list[str]) -> dict:
    """Prints the table; returns its figures."""
    model, found = ModelConfig(**{**ct_llm_2b().to_dict(), "remat": "none"}), {}
    for name in names:
        target = parse_slice(name)
        if reason := missing(target):
            print(f"{name}: left out: {reason}")
            continue
        found[name] = compiled_step(model, target)
    table(
        f"A token for each of {SLOTS} slots of {model.max_length} tokens, 2B in bf16, split over a slice's devices "
        "(compiler's figures for one device; of several, waiting for collectives is not counted)",
        ("slice", "held GiB", "besides GiB", "estimated ms", "floor ms"),
        [
            (
                name,
                step.held / GIB,
                step.temporary / GIB,
                1e3 * step.seconds if step.seconds else "n/a",
                1e3 * step.floor,
            )
            for name, step in found.items()
        ],
    )
    return {f"decode_besides_gib {name}": step.temporary / GIB for name, step in found.items()}


def compiled_step(model: ModelConfig, target: Slice) -> Step:
    """Compiles the step for all devices of a slice, heads and widths split over them."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=target.devices, context=1), devices(target))

    def array(shape: tuple[int, ...], dtype, *axes: str | None) -> jax.ShapeDtypeStruct:
        axes = axes or (None,) * len(shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(axes)))

    places = shardings(mesh, as_read(model), logical_axes(model))
    params = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), as_read(model), places)
    cache = (model.num_layers, SLOTS, model.num_kv_heads, model.max_length, model.head_dim)
    state = SlotState(
        *(array(cache, model.dtype, "layers", None, "kv_heads", None, None) for _ in range(2)),
        segments_ST=array((SLOTS, model.max_length), jnp.int32),
        length_S=array((SLOTS,), jnp.int32),
        token_S=array((SLOTS,), jnp.int32),
        seen_SV=array((SLOTS, model.padded_vocab_size), bool),
    )
    options = jax.tree.map(lambda own: array(own.shape, own.dtype), Options.of([None] * SLOTS))
    rows = array((SLOTS,), bool), array((SLOTS,), jnp.int32), options, array((SLOTS, 2), jnp.uint32)
    with jax.set_mesh(mesh):
        program = decode_step.lower(model, params, state, *rows).compile()
    memory, clock = program.memory_analysis(), target.chip.clock
    cycles = hlo.totals(program.as_text()).cycles if target.chip.platform == "tpu" else 0
    return Step(
        held=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        seconds=cycles / clock if cycles and clock else None,
        floor=memory.argument_size_in_bytes / target.chip.memory_bandwidth,
    )


if __name__ == "__main__":
    main()
