"""What is not MAP-CC, as SeqIO tasks: a user's own documents, evaluation sets, instruction records."""

import collections
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import seqio
import tensorflow as tf

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import expand
from ctllm_jax.data.chat import ChatTemplate, CtllmTemplate
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.evaluate.declarations import Item, load_benchmark, load_task
from ctllm_jax.evaluate.prompts import head, option_prompts
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
        # The key "" is in no record: the user's documents have neither a subset of MAP-CC nor need of an URL.
        self._fields = Fields(id=id_field, url="", source="", text=text_field)
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
    """Registers a declared task of kind lm_eval with the split "test"; returns its name, choice_NAME.

    Examples: inputs int32 [tokens], the prompt; targets int32 [tokens], the right choice and the end of document; id,
    inputs_pretokenized and targets_pretokenized, texts. Prompt and choice are parted as `ctllm eval` parts them: white
    space at the prompt's end belongs to the choice. The metric is the share of predictions equal to the right choice.

    Args:
      declaration: a TOML file, or the name of a shipped one.
      tokenizer: any of ours.
      data: folder of benchmarks; none is needed where the questions lie beside their declaration.

    Raises:
      UserError: names the file at fault, or the task is of another kind.
    """
    found = load_benchmark(load_task(declaration), data)
    task = found.task
    if task.kind != "lm_eval":
        raise UserError(f"{task.name} is of kind {task.kind}; a SeqIO task is made of kind lm_eval")

    def example(item: Item) -> dict:
        opening = head(found, item.subset, task.shots.count if task.shots else 0)
        prompt = option_prompts(task, item, opening)[item.gold]
        whole, given = tokenizer.encode_batch([prompt.text, prompt.context.rstrip()])
        return {
            "id": item.id,
            "inputs": tokenizer.start_ids + given,
            "targets": [*whole[len(given) :], tokenizer.eos_id],
            "inputs_pretokenized": prompt.context,
            "targets_pretokenized": prompt.delimiter + prompt.continuation,
        }

    examples = [example(item) for own in found.items.values() for item in own if item.gold is not None]
    name = f"choice_{task.name}"
    _add_answers(name, lambda split: examples, ("test",), tokenizer)
    return name


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
    name: str, examples: Callable[[str], Sequence[dict] | Iterator[dict]], splits: Sequence[str], tokenizer: Tokenizer
) -> None:
    """A task of `inputs` and `targets` from Python examples of a split."""
    signature = {key: tf.TensorSpec([None], tf.int32) for key in ("inputs", "targets")}
    texts = ("id", "inputs_pretokenized", "targets_pretokenized")
    signature |= {key: tf.TensorSpec([], tf.string) for key in texts}

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # SeqIO shuffles what comes
        return tf.data.Dataset.from_generator(lambda: examples(split), output_signature=signature)

    source = seqio.FunctionDataSource(dataset_fn, splits=splits)
    features = {"inputs": _feature(tokenizer), "targets": _feature(tokenizer)}
    _add(name, source, features, metric_fns=[exact_match])


def _add(name: str, source: seqio.DataSource, features: dict, **kwargs) -> None:
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(name, source=source, output_features=features, **{"preprocessors": [], **kwargs})


def _feature(tokenizer: Tokenizer) -> seqio.Feature:
    return seqio.Feature(vocabulary(tokenizer), add_eos=False, dtype=tf.int32)
