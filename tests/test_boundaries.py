"""Who may import whom: read from the sources, and seen in fresh interpreters."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import subprocess
import sys
import typing

import pytest

from ctllm_jax.plan.compile import source_files
from ctllm_jax.verbs import VERBS

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA_SIDE = {"tensorflow", "tensorflow_datasets", "seqio", "apache_beam", "data_pipeline"}
MODEL_SIDE = {"jax", "jaxlib", "flax", "optax", "orbax"}
# What both packages share; none of it needs JAX.
SHARED = {
    "ctllm_jax.common",
    "ctllm_jax.data.record",
    "ctllm_jax.data.tokenizer",
    "ctllm_jax.data.chat",
    "ctllm_jax.data.order",
    "ctllm_jax.data.store",
    "ctllm_jax.evaluate.declarations",
    "ctllm_jax.evaluate.extract",
    "ctllm_jax.evaluate.prompts",
    "ctllm_jax.evaluate.texts",
}
LONGEST = 400  # lines of a file


def sources(package: str) -> list[pathlib.Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: pathlib.Path) -> set[str]:
    """Full names of what a file imports anywhere, `from a import b` as a.b; also by a literal `import_module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", sources("ctllm_jax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_model_side_never_imports_the_data_side(path):
    assert not {name for name in imports(path) if within(name, DATA_SIDE)}


@pytest.mark.parametrize("path", sources("data_pipeline"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_data_side_imports_what_is_shared_and_never_jax(path):
    found = imports(path)
    assert not {name for name in found if within(name, MODEL_SIDE)}
    assert not {name for name in found if within(name, {"ctllm_jax"}) and not within(name, SHARED)}


@pytest.mark.parametrize("path", sources("ctllm_jax/common"), ids=lambda path: path.name)
def test_common_needs_the_standard_library_only(path):
    allowed = set(sys.stdlib_module_names) | {"ctllm_jax.common"}
    # upath is loaded by name, and only for gs:// and its like.
    assert {name for name in imports(path) if not within(name, allowed)} <= {"upath"}


def reached(modules: set[str], beside: frozenset[str] = frozenset()) -> set[pathlib.Path]:
    """Our files that importing those modules runs, but for packages and modules in `beside`."""

    def file_of(module: str) -> pathlib.Path | None:
        path = ROOT.joinpath(*module.split("."))
        return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)

    waiting, seen = [*modules], set()
    while waiting:
        parts = waiting.pop().split(".")
        for end in range(1, len(parts) + 1):  # importing a.b.c runs a, a.b and a.b.c
            path = file_of(".".join(parts[:end]))
            if path is not None and path not in seen:
                seen.add(path)
                found = {name for name in imports(path) if within(name, {"ctllm_jax"})}
                waiting += [name for name in found if not within(name, {*beside})]
    return seen


def test_what_is_shared_does_not_reach_jax_by_a_detour():
    seen = reached({f"{name}.x" for name in SHARED})
    assert not {path for path in seen if {n for n in imports(path) if within(n, MODEL_SIDE | DATA_SIDE)}}
    assert ROOT / "ctllm_jax" / "data" / "order.py" in seen


def test_a_kept_compilation_is_told_by_all_sources_of_the_step():
    """Left out is what reads a config, whose values are in the key, and what handles files and errors."""
    seen = reached({"ctllm_jax.plan.compile"}, frozenset({"ctllm_jax.train_config", "ctllm_jax.common"}))
    assert {path for path in seen if path.name != "__init__.py" or imports(path)} == {*source_files()}


@pytest.mark.parametrize("path", sources("configs"), ids=lambda path: path.name)
def test_configs_hold_values_only(path):
    assert all(within(name, {"ml_collections", "configs"}) for name in imports(path))


@pytest.mark.parametrize("path", sources("launch"), ids=lambda path: path.name)
def test_the_launcher_needs_neither_side(path):
    ours = {"launch", "ctllm_jax.cli", "ctllm_jax.verbs", "ctllm_jax.common"}
    allowed = set(sys.stdlib_module_names) | {"absl", "yaml"} | ours
    assert all(within(name, allowed) for name in imports(path))


PYTHON_FILES = [path for name in ("ctllm_jax", "data_pipeline", "configs", "launch") for path in sources(name)]


def test_files_can_be_read_in_one_go():
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON_FILES}
    assert not {name: size for name, size in sizes.items() if size > LONGEST}


def test_every_module_says_what_it_is_for():
    assert not [path for path in PYTHON_FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


# ---- In a fresh interpreter


def loaded(statement: str) -> set[str]:
    """Modules that a statement loads."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if line.startswith("import time:")}


def test_the_package_itself_loads_nothing_heavy():
    found = loaded("import ctllm_jax, ctllm_jax.cli, ctllm_jax.common.manifest, ctllm_jax.data.store")
    assert "ctllm_jax.cli" in found
    assert not {name for name in found if within(name, DATA_SIDE | {"jax", "flax"})}


@pytest.mark.parametrize("module", sorted({verb.module for verb in VERBS.values() if "ctllm_jax" in verb.module}))
def test_a_verb_of_the_model_side_loads_nothing_of_the_data_side(module):
    found = loaded(f"import {module}")
    assert module in found
    assert not {name for name in found if within(name, DATA_SIDE | {"torch", "transformers"})}


def test_the_data_sides_libraries_load_together():
    # A trap: SentencePiece 0.2.3 wants protobuf 7, TensorFlow and Beam hold protobuf 6.
    program = "import seqio, sentencepiece, apache_beam, tensorflow_datasets; print('together')"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.stdout.strip() == "together", process.stderr[-2000:]


# ---- Verbs


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_a_module_with_a_config_and_run(name):
    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    config = getattr(module, verb.config)
    assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen
    assert verb.default is None or (ROOT / verb.default).is_file()
    signature = inspect.signature(module.run)
    assert list(signature.parameters) == ["config", "workdir"]
    workdir = str if verb.writes else str | None
    assert typing.get_type_hints(module.run) == {"config": config, "workdir": workdir, "return": dict}
    assert verb.help and module.__doc__ and module.run.__doc__
    for key in verb.folders:  # "benchmarks.data": a key of a key
        kind = config
        for part in key.split("."):
            kind = typing.get_type_hints(kind)[part]


SMALL_SET = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    blocked = {"array_record", "ml_collections", "sentencepiece", "tokenizers", "safetensors", "jinja2",
               "upath", "gcsfs", "seqio", "tensorflow", "tensorflow_datasets", "apache_beam", "data_pipeline"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ImportError(f"{name} is not part of the small set")

sys.meta_path.insert(0, Refuse())
import jax, numpy as np
from ctllm_jax.model import ModelConfig, init_params
from ctllm_jax.objectives import ObjectiveConfig, make_objective
from ctllm_jax.duration import Clock
from ctllm_jax.optim import OptimizerConfig, make_optimizer
from ctllm_jax.sharding import MeshConfig, make_mesh
from ctllm_jax.step import abstract_batch, jit_step, start_state, state_shardings

model = ModelConfig(2, 32, 4, 2, 8, 48, 100, 128, 16, 1e-5, 1e4, None, False, False, 0.2, "float32", "float32", "full",
                    "xla")
config = OptimizerConfig(1e-2, 0.0, "constant", "0 steps", "", 0.9, 0.95, 1e-8, 0.1, 1.0, 2, 6.0)
optimizer = make_optimizer(config, model, Clock(tokens=128, run=3))
mesh = make_mesh(MeshConfig(2, -1, 2, 1))
layout = state_shardings(model, optimizer, mesh)
random = np.random.default_rng(0)
shapes = abstract_batch(8, 16, (), mesh)
values = {"tokens": random.integers(0, 100, (8, 16)), "positions": np.tile(np.arange(16), (8, 1)),
          "segments": np.ones((8, 16)), "labels": random.integers(0, 100, (8, 16)), "weights": np.ones((8, 16)),
          "source": np.zeros(8)}
batch = {name: jax.device_put(values[name].astype(like.dtype), like.sharding) for name, like in shapes.items()}
with jax.set_mesh(mesh):
    params = jax.jit(lambda key: init_params(model, key), out_shardings=layout.params)(jax.random.key(0))
    state = start_state(params, optimizer, layout)
    step = jit_step(make_objective(ObjectiveConfig("lm", 0.0, "auto", False, None), model, 1), optimizer, 2, layout)
    losses = []
    for _ in range(3):
        state, metrics = step(state, None, batch)
        losses.append(float(metrics["loss"]))
assert losses[2] < losses[1] < losses[0], losses
print("trained")
"""


def test_model_attention_losses_and_step_need_jax_and_its_libraries_alone():
    """They train on a synthetic batch over eight devices where nothing else can be imported."""
    ended = subprocess.run([sys.executable, "-c", SMALL_SET], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "trained\n", ended.stderr
