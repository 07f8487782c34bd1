"""What the items of a declared benchmark say, for those who look for them elsewhere. No JAX here.

A declaration wraps an item in words that all items of its task share, and that many documents may hold without ever
having seen the benchmark. Of the question, the delimiter and the right continuation only what lies between the first
and the last field of the row belongs to the item; letters of options stand between fields, so they stay.
"""

import string
from collections.abc import Iterator

from ctllm_jax.evaluate.declarations import Benchmark, Item, Task, fill

_FRAME = ("subset", "title")  # of all items of a subset


def item_texts(benchmark: Benchmark) -> Iterator[tuple[str, str]]:
    """(id, text) of every item; solved examples are none of them.

    Raises:
      UserError: the declaration names a field that a row lacks.
    """
    template = _core(benchmark.task)
    for items in benchmark.items.values():
        for item in items:
            yield item.id, fill(template, item.fields | {"option": _right_option(benchmark.task, item)})


def _core(task: Task) -> str:
    """The template from its first to its last field."""
    frame = _FRAME if any(_fields(option) for option in task.options) else (*_FRAME, "option")
    whole = task.question + (task.delimiter + task.continuation if task.options else "")
    parts = list(string.Formatter().parse(whole))
    own = [i for i, (_, field, _, _) in enumerate(parts) if field and field not in frame]
    if not own:
        return whole
    kept = [_written(*part) for part in parts[own[0] : own[-1] + 1]]
    kept[0] = _written("", *parts[own[0]][1:])
    return "".join(kept)


def _fields(template: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(template) if field]


def _written(literal: str, field: str | None, form: str | None, conversion: str | None) -> str:
    """A part of a template as it was before it was parsed."""
    doubled = literal.replace("{", "{{").replace("}", "}}")
    if field is None:
        return doubled
    return f"{doubled}{{{field}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}"


def _right_option(task: Task, item: Item) -> str:
    """The right option's text; '' where no option is right. A single option is the right one."""
    if item.gold is None and len(task.options) != 1:
        return ""
    return fill(task.options[item.gold or 0], item.fields)
