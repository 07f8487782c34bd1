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
        """All of it."""
        return self.context + self.delimiter + self.continuation


def head(benchmark: Benchmark, subset: str, shots: int) -> str:
    """What opens every prompt of a subset: the prefix and the first `shots` solved examples."""
    task = benchmark.task
    opening = _opening(task, subset)
    if task.shots is None:
        return opening
    solved = [_solved(task, example) for example in benchmark.examples[subset][:shots]]
    return opening + (task.shots.between.join(solved) + task.shots.close if solved else task.shots.bare)


def _opening(task: Task, subset: str) -> str:
    return fill(task.prefix, {"subset": subset, "title": task.titles[subset]})


def _solved(task: Task, example: Item) -> str:
    return task.delimiter.join(_question_and_answer(task, example))


def _question_and_answer(task: Task, example: Item) -> tuple[str, str]:
    fields = example.fields
    if example.gold is not None:
        fields = {**fields, "option": fill(task.options[example.gold], fields)}
    question = task.question if task.shots.question is None else task.shots.question
    return fill(question, fields), fill(task.shots.target, fields)


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


def turns(benchmark: Benchmark, item: Item, shots: int) -> list[dict[str, str]]:
    """The messages that ask an item of a generate task in conversation.

    Each of the first `shots` solved examples is a user's turn and the assistant's answer, the question at hand is the
    user's last turn; the task's prefix opens the first of them. What a declaration puts between these parts (delimiter,
    `between`, `close`) belongs to plain text and is left out; within the parts no white space is lost.
    """
    task, messages = benchmark.task, []
    for example in benchmark.examples[item.subset][:shots] if shots else ():
        question, answer = _question_and_answer(task, example)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": fill(task.question, item.fields)})
    messages[0]["content"] = _opening(task, item.subset) + messages[0]["content"]
    return messages
