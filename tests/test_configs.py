"""Every shipped config builds, and no value changes unnoticed: each is held against tests/golden/NAME.txt.

python tests/test_configs.py --write    # after an intended change; look at the difference before committing it
"""

import ast
import dataclasses
import difflib
import importlib
import pathlib
import re
import sys
from typing import Any

import pytest

from configs import hardware
from configs.mixtures import CT_LLM_SFT_RATIOS
from ctllm_jax.common.config import build
from ctllm_jax.verbs import VERBS

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
GOLDEN = pathlib.Path(__file__).with_name("golden")
RENEW = "If the change is meant, run `python tests/test_configs.py --write` and commit what it wrote."


@dataclasses.dataclass(frozen=True)
class Case:
    """A config with an argument: the verb that reads it, and the values that it leaves to the user."""

    file: str
    argument: str | None
    verb: str
    needed: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        name = self.file if self.argument is None else f"{self.file}.{self.argument}"
        return name.replace(":", "-").replace("*", "x")  # it is a file's name too


CASES = [
    Case("corpus", "default", "corpus"),
    Case("corpus", "ct_llm", "corpus"),
    Case("corpus", "released", "corpus"),
    Case("explain", None, "explain", (("documents", ("ID",)),)),
    Case("sweep", None, "sweep"),
    Case("contamination", None, "contamination", (("corpus", "CORPUS"),)),
    Case("tokenizer", "train", "tokenizer", (("corpus", "CORPUS"),)),
    Case("tokenizer", "given", "tokenizer", (("corpus", "CORPUS"), ("model", "MODEL"))),
    Case("tokenize", "pretrain", "tokenize", (("corpus", "CORPUS"),)),
    Case("tokenize", "chat", "tokenize", (("input", ("CHATS",)),)),
    *(Case("tokenize", f"chat@{ratio}", "tokenize", (("input", ("CHATS",)),)) for ratio in CT_LLM_SFT_RATIOS),
    Case("tokenize", "preference", "tokenize", (("input", ("PAIRS",)),)),
    *(Case("select", name, "select", (("scores", "DIR"),)) for name in ("ifd", "coig_pc", "open_hermes")),
    Case("pretrain", "ct_llm_2b", "train"),
    Case("pretrain", "tiny", "train"),
    *(Case("pretrain", f"ct_llm_2b@{name}", "train") for name in hardware.SLICES),
    Case("sft", "ct_llm_2b", "train", (("init_from", "RUN"),)),
    Case("sft", "tiny", "train", (("init_from", "RUN"),)),
    Case("dpo", "ct_llm_2b", "train", (("init_from", "RUN"),)),
    Case("dpo", "tiny", "train", (("init_from", "RUN"),)),
    Case("eval", None, "eval"),
    Case("eval", "ct_llm", "eval"),
    Case("eval", "lm_eval", "eval"),
    Case("eval", "chinese", "eval"),
    Case("compare", None, "compare", (("evaluations", ("A", "B")),)),
    Case("table", None, "table", (("evaluations", ("A", "B")),)),
    Case("answer", None, "answer"),
    Case("judge", "judge", "judge"),
    Case("judge", "one+other", "judge"),
    Case("pairs", None, "pairs", (("earlier", "DIR"),)),
    Case("generate", None, "generate"),
    Case("chat", None, "chat"),
    Case("serve", None, "serve"),
    Case("convert", None, "convert"),
    Case("trace", None, "trace", (("step", 1),)),
    Case("report", None, "report", (("runs", ("RUN",)),)),
    Case("quickstart", None, "quickstart"),
]
# No configs of a verb: what others are composed of.
PARTS = {"__init__", "arguments", "hardware", "models", "mixtures", "sampling"}
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def values_of(case: Case) -> dict:
    config = importlib.import_module(f"configs.{case.file}")
    config = config.get_config() if case.argument is None else config.get_config(case.argument)
    return {**config.to_dict(), **dict(case.needed)}


def built(case: Case) -> Any:
    verb = VERBS[case.verb]
    return build(getattr(importlib.import_module(verb.module), verb.config), values_of(case))


def snapshot(case: Case) -> str:
    """One line a value, `path = value`, in the dataclass's order; entries of tables by name."""
    lines = []

    def walk(value: Any, path: str) -> None:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
        elif isinstance(value, dict) and value:
            for key in sorted(value):
                walk(value[key], f"{path}.{key}")
        else:
            lines.append(f"{path} = {value!r}")

    walk(built(case), "")
    return "\n".join(lines) + "\n"


@each
def test_values_are_those_of_the_golden_file(case):
    file = GOLDEN / f"{case.name}.txt"
    assert file.exists(), f"{file} is missing. {RENEW}"
    difference = "".join(
        difflib.unified_diff(
            file.read_text(encoding="utf-8").splitlines(keepends=True),
            snapshot(case).splitlines(keepends=True),
            str(file),
            f"configs/{case.file}.py now",
        )
    )
    assert not difference, f"\n{difference}\n{RENEW}"


def test_golden_files_and_configs_are_the_same_set():
    assert {file.stem for file in GOLDEN.iterdir()} == {case.name for case in CASES}, RENEW
    shipped = {file.stem for file in CONFIGS.glob("*.py")} - PARTS
    assert {case.file for case in CASES} == shipped, "a config in configs/ has no case in tests/test_configs.py"


def test_every_default_config_of_a_verb_is_shipped():
    for name, verb in VERBS.items():
        assert verb.default is None or (ROOT / verb.default).is_file(), name
        assert any(case.verb in (name, verb.about) for case in CASES), name


DEFAULT_ARGUMENTS = {
    "corpus": "default",
    "pretrain": "tiny",
    "sft": "ct_llm_2b",
    "dpo": "ct_llm_2b",
    "tokenizer": "train",
    "tokenize": "pretrain",
    "eval": "",
    "judge": "judge",
    "select": "ifd",
}


@pytest.mark.parametrize("file", sorted({case.file for case in CASES if case.argument is not None}))
def test_without_an_argument_a_config_is_the_one_named_here(file):
    module = importlib.import_module(f"configs.{file}")
    assert module.get_config().to_dict() == module.get_config(DEFAULT_ARGUMENTS[file]).to_dict()


@pytest.mark.parametrize("file", sorted(DEFAULT_ARGUMENTS.keys() - {"judge"}))  # whose argument is a name of one's own
def test_an_argument_that_no_config_has_is_named_with_those_that_there_are(file):
    with pytest.raises(ValueError, match=f"'nonsense' is unknown; there are: .*{DEFAULT_ARGUMENTS[file]}"):
        importlib.import_module(f"configs.{file}").get_config("nonsense")


def test_a_ratio_that_no_mixture_has_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="'3:1' is unknown; there are: 1:1, 2:1, 4:1, 8:1, zh, en"):
        importlib.import_module("configs.tokenize").get_config("chat@3:1")


@each
def test_a_config_is_built_anew_every_time(case):
    module = importlib.import_module(f"configs.{case.file}")
    arguments = () if case.argument is None else (case.argument,)
    first, second = module.get_config(*arguments), module.get_config(*arguments)
    assert first == second and first is not second
    name = next(key for key, value in first.items() if not hasattr(value, "items"))
    with first.ignore_type():
        first[name] = "changed"
    assert module.get_config(*arguments) == second


@pytest.mark.parametrize("file", sorted({case.file for case in CASES}))
def test_a_configs_docstring_gives_the_command(file):
    text = ast.get_docstring(ast.parse((CONFIGS / f"{file}.py").read_text(encoding="utf-8")))
    verb = next(case.verb for case in CASES if case.file == file)
    assert re.search(rf"^\s*ctllm {verb} .*--{'workdir' if VERBS[verb].workdir else 'config.model'}=", text, re.M)
    for argument in re.findall(rf"--config=configs/{file}\.py:([^\s`,.)]+)", text):
        assert argument in {case.argument for case in CASES if case.file == file}


def test_ct_llm_2b_has_the_published_hyper_parameters():
    # arXiv 2404.04167 and the released config.json.
    config = built(next(case for case in CASES if case.name == "pretrain.ct_llm_2b"))
    model, optimizer = config.model, config.optimizer
    assert (model.num_layers, model.d_model, model.num_heads, model.d_ff) == (32, 2048, 16, 5504)
    assert (model.vocab_size, model.padded_vocab_size, model.max_length) == (125_696, 125_824, 4096)
    assert (optimizer.learning_rate, optimizer.final_learning_rate, optimizer.warmup) == (2e-4, 2e-5, "2000 steps")
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    clock = config.clock(model.max_length)
    assert clock.tokens == 512 * 4096
    assert clock.run * clock.tokens == pytest.approx(1_254.68e9, rel=1e-6)


def write() -> None:
    """Writes every golden file anew, all or none."""
    texts = {GOLDEN / f"{case.name}.txt": snapshot(case) for case in CASES}
    GOLDEN.mkdir(exist_ok=True)
    for file in set(GOLDEN.iterdir()) - set(texts):
        file.unlink()
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
        print(file)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
