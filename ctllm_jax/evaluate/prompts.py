"""The texts that a declared task puts before the model."""

from typing import NamedTuple

from ctllm_jax.evaluate.declarations import Benchmark, Item, Task, fill, options


class Prompt(NamedTuple):
    """One option's text: context + delimiter + continuation."""

    context: str
    delimiter: str
    continuation: str

    @property
    def text(self) -> str:
        return self.context + self.delimiter + self.continuation


def head(benchmark: Benchmark, subset: str, shots: int) -> str:
    """What opens every prompt of a subset: the prefix and the first `shots` solved examples."""
    task = benchmark.task
    opening = fill(task.prefix, {"subset": subset, "title": task.titles[subset]})
    if task.shots is None:
        return opening
    solved = [_solved(task, example) for example in benchmark.examples[subset][:shots]]
    return opening + (task.shots.between.join(solved) + task.shots.close if solved else task.shots.bare)


def _solved(task: Task, example: Item) -> str:
    fields = example.fields
    if example.gold is not None:
        fields = {**fields, "option": fill(task.options[example.gold], fields)}
    question = task.question if task.shots.question is None else task.shots.question
    return fill(question, fields) + task.delimiter + fill(task.shots.target, fields)


def option_prompts(task: Task, item: Item, opening: str) -> list[Prompt]:
    """A prompt for each option, after `head`'s opening."""
    prompts = []
    for template in options(task, item.fields):
        fields = {**item.fields, "option": fill(template, item.fields)}
        prompts.append(Prompt(opening + fill(task.question, fields), task.delimiter, fill(task.continuation, fields)))
    return prompts


def open_prompt(task: Task, item: Item, opening: str) -> str:
    """The prompt of a generate task, or the text of a rolling one."""
    return opening + fill(task.question, item.fields)
