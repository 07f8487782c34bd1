"""Every config key of every verb, with its unit, its values in the shipped configs and what it means.

    python -m ctllm_jax.keys > docs/reference/config.md

A key is described where it is declared, in its dataclass: by the comment beside it or, where it takes more words, by
`key: text` in the class's docstring. Numbers begin with their unit, as in `# [tokens] of a row`; 1 stands for none. A
list or table of names that a description goes by, as in `# one of LOSSES`, is written out.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import Any

from ctllm_jax.verbs import VERBS, Verb

# Where one verb has several configs: the arguments whose values stand side by side. A key that is spelt the same in all
# is shown once.
SHOWN = {
    "train": (("pretrain", "ct_llm_2b"), ("sft", "ct_llm_2b"), ("dpo", "ct_llm_2b")),
    "tokenizer": (("tokenizer", "train"), ("tokenizer", "given")),
    "tokenize": (("tokenize", "pretrain"), ("tokenize", "chat"), ("tokenize", "preference")),
    "corpus": (("corpus", "default"), ("corpus", "ct_llm"), ("corpus", "released")),
    "select": (("select", "ifd"), ("select", "coig_pc"), ("select", "open_hermes")),
    "eval": (("eval", ""), ("eval", "ct_llm")),
}
_UNIT = re.compile(r"(?:\[([^]]+)\] )?(.*)", re.DOTALL)
_CONSTANT = re.compile(r"\b(?:([a-z_.]+)\.)?([A-Z_]{4,})\b(?!:)")  # a colon begins an explanation
_NONE = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """path: as after `--config.`; kind: of its values; unit: of numbers, else empty; meaning: its description."""

    path: str
    kind: str
    unit: str
    meaning: str


def keys_of(cls: type, path: str = "") -> Iterator[Key]:
    """The keys of a config dataclass, groups of keys first; entries of tables have a NAME in capitals."""
    hints, texts = typing.get_type_hints(cls), descriptions(cls)
    for field in dataclasses.fields(cls):
        unit, text = _UNIT.fullmatch(texts.get(field.name, "")).groups()
        meaning = _CONSTANT.sub(functools.partial(_written_out, module=cls.__module__), text)
        where = f"{path}{field.name}"
        inner, kind, names = _inside(hints[field.name])
        yield Key(where, kind, unit or "", meaning)
        if inner is not None:
            yield from keys_of(inner, f"{where}.{names}")


def _written_out(found: re.Match, module: str) -> str:
    """The name of a module's names, by default of `module`, with these behind it; any other word as it is."""
    names = getattr(importlib.import_module(found[1] or module), found[2], None)
    is_known = isinstance(names, (dict, tuple)) and all(isinstance(name, str) for name in names)
    return f"{found[0]} ({', '.join(names)})" if is_known else found[0]


def _inside(hint: Any) -> tuple[type | None, str, str]:
    """(the dataclass that a key's value is made of, what the value is called, NAME. for each table around it)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner, kind, names = _inside(next(option for option in arguments if option is not type(None)))
        return inner, f"None or {kind}", names
    if dataclasses.is_dataclass(hint):
        return hint, "group", ""
    if origin is dict:
        inner, kind, names = _inside(arguments[1])
        return inner, "table" if inner else f"table of {kind}", f"NAME.{names}"
    if origin is tuple:
        inner, kind, names = _inside(arguments[0])
        return inner, f"list of {kind}", "N." if inner else ""
    return None, {str: "text", bool: "True or False"}.get(hint, hint.__name__), ""


@functools.cache
def descriptions(cls: type) -> dict[str, str]:
    """What a dataclass and those it is made from say of their keys."""
    texts: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if dataclasses.is_dataclass(one):
            texts |= _in_docstring(one) | _in_comments(one)
    return texts


def _in_comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    fields = (node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign))
    return {node.target.id: comments[node.lineno] for node in fields if node.lineno in comments}


def _in_docstring(cls: type) -> dict[str, str]:
    names = "|".join(field.name for field in dataclasses.fields(cls))
    begins = list(re.finditer(rf"(?:^|\n\s*|; )({names}): ", cls.__doc__ or "")) if names else []
    ends = [found.start() for found in begins[1:]] + [None] * bool(begins)
    return {
        found[1]: " ".join(cls.__doc__[found.end() : end].split("\n\n")[0].split()).rstrip(".")
        for found, end in zip(begins, ends, strict=True)
    }


def configs_of(name: str, verb: Verb) -> dict[str, dict]:
    """The values of the configs that stand beside a verb's keys, by FILE or FILE:ARGUMENT."""
    if name not in SHOWN:
        file = verb.default.removeprefix("configs/").removesuffix(".py")
        return {file: importlib.import_module(f"configs.{file}").get_config().to_dict()}
    values = {}
    for file, argument in SHOWN[name]:
        config = importlib.import_module(f"configs.{file}").get_config(argument)
        values[f"{file}:{argument}" if argument else file] = config.to_dict()
    return values


def value_at(values: Any, path: str) -> Any:
    """The value of a key, or `_NONE` where the config leaves its group out or names its entries itself."""
    for part in path.split("."):
        if not isinstance(values, dict) or part not in values:
            return _NONE
        values = values[part]
    return values


def _shown(value: Any) -> str:
    if value is _NONE:
        return ""
    if isinstance(value, dict):
        return "" if value else "empty"
    if isinstance(value, (list, tuple)) and len(value) > 4:
        return f"{len(value)} entries"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return f"`{text}`".replace("|", "\\|")


def _rows(name: str, verb: Verb) -> Iterator[str]:
    """The rows of a verb's table."""
    configs = configs_of(name, verb)
    for key in keys_of(getattr(importlib.import_module(verb.module), verb.config)):
        values = [_shown(value_at(config, key.path)) for config in configs.values()]
        if key.kind == "group":
            values = [""] * len(values)
        cells = [f"`{key.path}`", key.kind, key.unit, *values, key.meaning.replace("|", "\\|")]
        yield "| " + " | ".join(cells) + " |"


def _limits(file: str, arguments: Sequence[str]) -> Iterator[str]:
    """The limits of the filters, a measure a row."""
    module = importlib.import_module(f"configs.{file}")
    rules = [module.get_config(name).to_dict()["filters"]["rules"] for name in arguments]
    measures = dict.fromkeys((family, name) for one in rules for family, limits in one.items() for name in limits)
    for family, name in sorted(measures):
        cells = []
        for one in rules:
            bounds = one.get(family, {}).get(name, {})
            cells.append(", ".join(f"{bound} {value:,}" for bound, value in bounds.items()))
        yield "| " + " | ".join([family, f"`{name}`", *cells]) + " |"


def document() -> str:
    """The text of docs/reference/config.md."""
    lines = [
        "# Every config key",
        "",
        "`--config.KEY=VALUE` sets one: a list as `\"('a', 'b')\"`, a table as `\"{'zh': 4, 'en': 1}\"`, whole. No",
        "flag says None, or adds a key to a group: that takes a config file of your own ([how](../howto/filter.md)).",
        "",
        "Made by `python -m ctllm_jax.keys > docs/reference/config.md` from the dataclasses that the verbs read and",
        "from the shipped configs; a test holds it to them. An empty cell: no such group in that config. Other",
        "arguments of a config have other values, which `--print_config` shows. `plan` reads the keys of `train`.",
        "",
        "Verbs: " + ", ".join(f"[{name}](#{name})" for name in VERBS if name != "plan"),
    ]
    for name, verb in VERBS.items():
        if name == "plan":
            continue
        header = ["key", "value", "unit", *configs_of(name, verb), "meaning"]
        lines += ["", f"## {name}", "", f"{verb.help}.", ""]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *_rows(name, verb)]
        if name == "corpus":
            arguments = [argument for _, argument in SHOWN[name]]
            lines += ["", "### Limits of the filters", ""]
            lines += ["`filters.rules.FAMILY.MEASURE.BOUND`; an empty cell: no limit.", ""]
            lines += ["| family | measure | " + " | ".join(arguments) + " |", "|" + "---|" * (2 + len(arguments))]
            lines += _limits("corpus", arguments)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
