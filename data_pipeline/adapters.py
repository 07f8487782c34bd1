"""What is not MAP-CC, as SeqIO tasks: a user's own documents, evaluation sets, instruction records."""

import collections
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import seqio
import tensorflow as tf

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import expand
from ctllm_jax.data.chat import ChatTemplate, CtllmTemplate
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.evaluate.declarations import Item, load_benchmark, load_task
from ctllm_jax.evaluate.extract import agreement, extracted, until_stop
from ctllm_jax.evaluate.prompts import head, open_prompt, option_prompts
from data_pipeline.documents import SUBSETS, DocumentReader, Fields, InputFile, Malformed, input_files
from data_pipeline.splits import is_held_out
from data_pipeline.tasks import SPLITS, tokenize_documents
from data_pipeline.vocabulary import vocabulary

MAX_RECORD_BYTES = 16 * 2**20  # longer records are rejected and never held whole


# ---- Documents of a folder


class JsonlSource(seqio.FileDataSource):
    """{id, text} of JSON-lines files, plain or gzip, divided into train and validation by the hash of the id.

    Shards are the files. A record without id is named by its file and line. What is no document is told when its file
    has been read to the end for the first time, and stays in `rejected`.

    Attributes:
      rejected: {file: {reason: records}} of the files read to their end, those without rejections included.
    """

    def __init__(self, patterns: Sequence[str], text_field: str, id_field: str, share: float):
        files = input_files(expand(patterns))
        self._files = {file.path: file for file in files}
        # The user's documents have neither a subset of MAP-CC nor need of a URL.
        self._fields = Fields(id=id_field, url=None, source=None, text=text_field)
        self._share = share
        self.rejected: dict[str, collections.Counter] = {}
        super().__init__(self._read_file, split_to_filepattern=dict.fromkeys(SPLITS, list(self._files)))

    def get_dataset(self, split: str = "train", *args, **kwargs) -> tf.data.Dataset:
        held_out = split == "validation"
        documents = super().get_dataset(split, *args, **kwargs)
        return documents.filter(lambda document: tf.equal(is_held_out(document["id"], self._share), held_out))

    def list_shards(self, split: str) -> list[str]:
        return list(self._files)

    def _read_file(self, path: tf.Tensor) -> tf.data.Dataset:
        signature = {name: tf.TensorSpec([], tf.string) for name in ("id", "text")}
        return tf.data.Dataset.from_generator(self._documents, output_signature=signature, args=(path,))

    def _documents(self, path: bytes) -> Iterator[dict[str, str]]:
        file: InputFile = self._files[path.decode()]
        reader = DocumentReader(file, self._fields, SUBSETS[0], MAX_RECORD_BYTES)
        reasons, first = collections.Counter(), ""
        for record in reader:
            if isinstance(record, Malformed):
                reasons[record.reason] += 1
                first = first or f"line {record.line}: {record.detail}"
            else:
                yield {"id": record.id, "text": record.text}
        if reader.damage:
            reasons["damaged"] += 1
            first = first or reader.damage
        if reasons and file.path not in self.rejected:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            print(f"{file.path}: no documents: {counts} (first: {first})", file=sys.stderr)
        self.rejected[file.path] = reasons


def folder_task(
    name: str,
    patterns: Sequence[str],
    tokenizer: Tokenizer,
    share: float,
    text_field: str = "text",
    id_field: str = "id",
) -> str:
    """Registers a task of a user's own documents; returns its name.

    Examples: targets int32 [tokens], `<s>` text `</s>`; id and bytes, scalars; as `tasks.corpus_tasks` gives them.

    Args:
      name: of the task.
      patterns: paths or globs of .jsonl files, each also gzipped.
      tokenizer: any of ours.
      share: part of the documents held out, by the hash of the id: the same ids as in a store.
      text_field, id_field: keys of a record.

    Raises:
      UserError: a pattern names no file.
    """
    _add(
        name,
        JsonlSource(patterns, text_field, id_field, share),
        {"targets": _feature(tokenizer)},
        preprocessors=[functools.partial(tokenize_documents, tokenizer=tokenizer)],
    )
    return name


# ---- Evaluation sets


def choice_task(declaration: str, tokenizer: Tokenizer, data: str = "") -> str:
    """Registers a declared task of kind lm_eval, ppl or ll with the split "test"; returns its name, choice_NAME.

    Examples: inputs int32 [tokens], the prompt; targets int32 [tokens], the right choice and the end of document; id,
    inputs_pretokenized and targets_pretokenized, texts. Of kind lm_eval, prompt and choice are parted as `ctllm eval`
    parts them: white space at the prompt's end belongs to the choice. Of the other kinds, whose options are scored as
    whole texts, inputs are the ids with which all options begin. The metric is the share of predictions equal to the
    right choice.

    Args:
      declaration: a TOML file, or the name of a shipped one.
      tokenizer: any of ours.
      data: folder of benchmarks; none is needed where the questions lie beside their declaration.

    Raises:
      UserError: names the file at fault, or the task is of another kind.
    """
    found = load_benchmark(load_task(declaration), data)
    task = found.task
    if task.kind not in ("lm_eval", "ppl", "ll"):
        raise UserError(f"{task.name} is of kind {task.kind}; choices are of kind lm_eval, ppl or ll")

    def example(item: Item) -> dict:
        prompts = option_prompts(task, item, head(found, item.subset, task.shots.count if task.shots else 0))
        if task.kind == "lm_eval":
            prompt = prompts[item.gold]
            given, answer = prompt.context, prompt.delimiter + prompt.continuation
            whole, inputs = tokenizer.encode_batch([prompt.text, given.rstrip()])
        else:
            texts = [prompt.text for prompt in prompts]
            given = os.path.commonprefix(texts)
            answer, options = texts[item.gold][len(given) :], tokenizer.encode_batch(texts)
            whole, inputs = options[item.gold], os.path.commonprefix(options)
        return _answered(tokenizer, item, (inputs, whole[len(inputs) :]), (given, answer))

    examples = [example(item) for own in found.items.values() for item in own if item.gold is not None]
    name = f"choice_{task.name}"
    _add_answers(name, lambda split: examples, ("test",), tokenizer)
    return name


def written_task(declaration: str, tokenizer: Tokenizer, data: str = "") -> str:
    """Registers a declared task of kind generate with the split "test"; returns its name, written_NAME.

    Examples as of `choice_task`: inputs are the prompt, targets the first accepted answer and the end of document. The
    metrics are the declaration's: predictions end at its stop texts, and answers are read from them and held to those
    that are accepted as `ctllm eval` does.

    Raises:
      UserError: names the file at fault; the task is of another kind, or its answers are programs to be run.
    """
    found = load_benchmark(load_task(declaration), data)
    task = found.task
    if task.kind != "generate" or task.match == "program":
        what = "programs, which `ctllm eval` runs" if task.match == "program" else f"kind {task.kind}"
        raise UserError(f"{task.name} is of {what}; a written task is of kind generate, with texts as answers")
    items = {item.id: item for own in found.items.values() for item in own}

    def example(item: Item) -> dict:
        prompt = open_prompt(task, item, head(found, item.subset, task.shots.count if task.shots else 0))
        texts = prompt, item.answers[0] if item.answers else ""
        return _answered(tokenizer, item, tuple(tokenizer.encode_batch(texts)), texts)

    def postprocess(text: str, example: dict | None = None, is_target: bool = False) -> str:
        return example["id"].decode() if is_target else until_stop(text, task.stop)

    def metrics(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        asked, means = [items[name] for name in targets], {}
        for metric, rule in task.extract.items():
            match = task.matches.get(metric, task.match)
            marks = [
                agreement(match, extracted(rule, text, item.answers), item.answers)
                for item, text in zip(asked, predictions, strict=True)
            ]
            means[metric] = sum(marks) / len(marks)
        return means

    name = f"written_{task.name}"
    examples = [example(item) for item in items.values()]
    _add_answers(name, lambda split: examples, ("test",), tokenizer, metrics, postprocess)
    return name


def _answered(tokenizer: Tokenizer, item: Item, ids: tuple[list[int], list[int]], texts: tuple[str, str]) -> dict:
    """An example of (what is given, the answer)."""
    return {
        "id": item.id,
        "inputs": tokenizer.start_ids + ids[0],
        "targets": [*ids[1], tokenizer.eos_id],
        "inputs_pretokenized": texts[0],
        "targets_pretokenized": texts[1],
    }


# ---- Instructions


def instruction_tasks(
    records: Sequence[dict], tokenizer: Tokenizer, share: float, template: ChatTemplate | None = None
) -> dict[str, str]:
    """Registers a task per source of instruction records; {source: task name}, instruction_SOURCE.

    Examples, one for each answer of a conversation: inputs int32 [tokens], all before the answer, up to where the
    assistant speaks; targets int32 [tokens], the answer and the end of its turn; id and targets_pretokenized (the
    answer), texts. SeqIO cuts inputs and targets each by itself; `chat_tasks.chat_tasks` has whole conversations.
    The metric is the share of predictions equal to the answer.

    Args:
      records: as `records.read_records` gives them.
      tokenizer: any of ours.
      share: part of the records held out, by the hash of the id.
      template: None is ours.
    """
    template = template or CtllmTemplate(tokenizer)
    sources: dict[str, list[dict]] = {}
    for record in records:
        sources.setdefault(record.get("source", record.get("language", "chat")), []).append(record)

    def answers(own: Sequence[dict]) -> Iterator[dict]:
        for record in own:
            for number, message in enumerate(record["messages"], 1):
                if message["role"] == "assistant":
                    ids, mask = template.render(record["messages"][:number], "last")
                    start = mask.index(1)
                    yield {
                        "id": record["id"],
                        "inputs": ids[:start],
                        "targets": [token for token, learned in zip(ids, mask, strict=True) if learned],
                        "inputs_pretokenized": "\n\n".join(m["content"] for m in record["messages"][: number - 1]),
                        "targets_pretokenized": message["content"],
                    }

    names = {}
    for source, own in sorted(sources.items()):
        held_out = is_held_out(tf.constant([record["id"] for record in own]), share).numpy()
        parts = {
            split: [record for record, held in zip(own, held_out, strict=True) if held == (split == "validation")]
            for split in SPLITS
        }
        names[source] = name = f"instruction_{source.replace('-', '.')}"  # SeqIO knows no hyphen
        _add_answers(name, lambda split, parts=parts: answers(parts[split]), SPLITS, tokenizer)
    return names


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """{"exact_match": share of predictions equal to their targets, white space at the ends aside}."""
    right = [target.strip() == found.strip() for target, found in zip(targets, predictions, strict=True)]
    return {"exact_match": sum(right) / len(right)}


# ---- Registration


def _add_answers(
    name: str,
    examples: Callable[[str], Sequence[dict] | Iterator[dict]],
    splits: Sequence[str],
    tokenizer: Tokenizer,
    metric: Callable[..., dict[str, float]] = exact_match,
    postprocess: Callable[..., Any] | None = None,
) -> None:
    """A task of `inputs` and `targets` from Python examples of a split; metric and postprocess are as SeqIO's."""
    signature = {key: tf.TensorSpec([None], tf.int32) for key in ("inputs", "targets")}
    texts = ("id", "inputs_pretokenized", "targets_pretokenized")
    signature |= {key: tf.TensorSpec([], tf.string) for key in texts}

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # SeqIO shuffles what comes
        return tf.data.Dataset.from_generator(lambda: examples(split), output_signature=signature)

    source = seqio.FunctionDataSource(dataset_fn, splits=splits)
    features = {"inputs": _feature(tokenizer), "targets": _feature(tokenizer)}
    _add(name, source, features, metric_fns=[metric], postprocess_fn=postprocess)


def _add(name: str, source: seqio.DataSource, features: dict, **kwargs) -> None:
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(name, source=source, output_features=features, **{"preprocessors": [], **kwargs})


def _feature(tokenizer: Tokenizer) -> seqio.Feature:
    return seqio.Feature(vocabulary(tokenizer), add_eos=False, dtype=tf.int32)
