"""The verbs of the command line: where each lives, what it needs, what it turns into what."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Short:
    """A key of a verb's config that is a flag as well: `--step=5` is `--config.step=5`."""

    form: str  # as the help writes it: "--step=N"
    help: str
    bare: str | None = None  # the value that the flag alone stands for; None: it needs one


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag of a verb that is no key of its config file."""

    form: str  # as the help writes it
    help: str
    default: str | float | int | bool


@dataclasses.dataclass(frozen=True)
class Verb:
    """Where a verb lives, its config dataclass and default config file, and what it turns into what."""

    module: str
    config: str
    default: str | None
    help: str
    workdir: str | None = "folder to write; a second run resumes or says why not"  # None: it reads none and writes none
    short: Mapping[str, Short] = dataclasses.field(default_factory=dict)
    about: str | None = None  # the key of the config dataclass that the config file fills; the options fill the others
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    writes: bool = True  # whether --workdir is needed
    reads: bool = False  # whether --workdir is only looked into
    mirrored: bool = True  # whether a --workdir on a bucket is a folder of this machine while the verb is at work
    folders: tuple[str, ...] = ()  # keys of the config that name folders which have to be on a disk
    extra: str = "data"  # what to install where a library is missing
    bare: tuple[str, str] | None = None  # arguments without a flag: the key that lists them, how the help has them


VERBS = {
    "corpus": Verb(
        "data_pipeline.corpus",
        "CorpusConfig",
        "configs/corpus.py",
        "raw documents -> MAP-CC, rejects with every reason, report",
        folders=("dedup.earlier", "benchmarks.data"),
    ),
    "explain": Verb(
        "data_pipeline.explain",
        "ExplainConfig",
        "configs/explain.py",
        "corpus + document ids -> where each came from, every rule, duplicates, what became of it",
        workdir="folder of `ctllm corpus` to look into; nothing is written",
        short={
            "text_chars": Short("--text_chars=N", "characters of text to show"),
            "json": Short("--json", "a JSON object a line instead of text", bare="True"),
        },
        bare=("documents", "ID [ID ...]"),
        reads=True,
    ),
    "sweep": Verb(
        "data_pipeline.sweep",
        "SweepConfig",
        "configs/sweep.py",
        "corpus -> which share of it other thresholds would keep, from stored signals",
        workdir="folder of `ctllm corpus` to look into; nothing is written",
        short={"json": Short("--json", "a JSON object a line instead of a table", bare="True")},
        reads=True,
    ),
    "contamination": Verb(
        "data_pipeline.contamination.run",
        "ContaminationConfig",
        "configs/contamination.py",
        "documents, conversations or token store + benchmarks -> which items they hold, and where",
        folders=("corpus", "benchmarks.data"),
    ),
    "tokenizer": Verb(
        "data_pipeline.tokenizer",
        "TokenizerConfig",
        "configs/tokenizer.py",
        "MAP-CC -> SentencePiece model (or one that is given), fertility report",
        folders=("corpus", "model"),
    ),
    "tokenize": Verb(
        "data_pipeline.token_store",
        "TokenizeConfig",
        "configs/tokenize.py",
        "documents or conversations + tokenizer -> token store",
        folders=("corpus", "tokenizer"),
    ),
    "plan": Verb(
        "ctllm_jax.plan.run",
        "PlanConfig",
        None,
        "training config + slice -> memory, FLOPs, traffic, time, cost; nothing is trained",
        workdir="folder for plan.json, if it is wanted",
        about="train",
        options={
            "slice": Option("--slice=NAME[,NAME]", "v5e:16x16, v5p-128 (64 chips), 2*v5e:16x16, h200x8, ...", ""),
            "tokens": Option("--tokens=N", "billions of tokens to train on; without it the config's own steps", 0.0),
            "search": Option("--search", "rank meshes, remat policies and microbatches", False),
            "compile": Option("--nocompile", "leave it at arithmetic, in a second instead of a minute", True),
            "json": Option("--json", "a JSON object a line instead of text", False),
        },
        writes=False,
        mirrored=False,
    ),
    "train": Verb(
        "ctllm_jax.train",
        "TrainConfig",
        None,  # a run is always named: configs/pretrain.py, configs/sft.py, configs/dpo.py
        "token store -> checkpoints: pretraining, SFT, DPO",
        mirrored=False,
    ),
    "eval": Verb(
        "ctllm_jax.evaluate.run",
        "EvalConfig",
        "configs/eval.py",
        "checkpoint or Hugging Face folder + tasks -> scores",
        folders=("data",),
    ),
    "compare": Verb(
        "ctllm_jax.evaluate.compare",
        "CompareConfig",
        "configs/compare.py",
        "two folders of `ctllm eval` -> by how much they differ, item by item, and whether that is chance",
        workdir="folder for comparison.json, if it is wanted",
        writes=False,
        bare=("evaluations", "A B"),
        mirrored=False,
    ),
    "table": Verb(
        "ctllm_jax.evaluate.leaderboard",
        "TableConfig",
        "configs/table.py",
        "folders of `ctllm eval` -> one table, beside the scores that CT-LLM reported",
        workdir="folder for table.md, table.tex, table.json and table.png, if they are wanted",
        short={
            "reported": Short("--reported=TABLE", "of CT-LLM's tables: base, aligned, checkpoints, or '' (base)"),
            "contamination": Short("--contamination=DIR", "scores without the items that the training data held, too"),
        },
        writes=False,
        bare=("evaluations", "EVALUATION [EVALUATION ...]"),
        mirrored=False,
    ),
    "answer": Verb(
        "ctllm_jax.evaluate.judged.answers",
        "AnswerConfig",
        "configs/answer.py",
        "checkpoint or Hugging Face folder + open questions -> answers",
    ),
    "judge": Verb(
        "ctllm_jax.evaluate.judged.run",
        "JudgingConfig",
        "configs/judge.py",
        "answers of one model -> marks by other models; of two -> which is better",
    ),
    "select": Verb(
        "ctllm_jax.selection",
        "SelectConfig",
        "configs/select.py",
        "conversations + a model -> those whose answers it finds neither too surprising nor too plain",
    ),
    "pairs": Verb(
        "ctllm_jax.pairs",
        "PairsConfig",
        "configs/pairs.py",
        "prompts -> a model's own answers, ranked by judges or a function -> preference pairs",
    ),
    "generate": Verb("ctllm_jax.samples", "GenerateConfig", "configs/generate.py", "checkpoint + prompts -> text"),
    "chat": Verb(
        "ctllm_jax.chat",
        "ChatConfig",
        "configs/chat.py",
        "a conversation with a checkpoint, in a terminal",
        workdir=None,
        writes=False,
    ),
    "serve": Verb(
        "ctllm_jax.serve.run",
        "ServeConfig",
        "configs/serve.py",
        "a checkpoint as an HTTP server that OpenAI's clients can talk to",
        workdir=None,
        writes=False,
        extra="serve",
    ),
    "convert": Verb(
        "ctllm_jax.convert", "ConvertConfig", "configs/convert.py", "run directory <-> Hugging Face folder"
    ),
    "trace": Verb(
        "ctllm_jax.trace",
        "TraceConfig",
        "configs/trace.py",
        "training run -> the documents that a step saw, the steps that saw a document",
        workdir="run directory to look into; nothing is written",
        short={
            "step": Short("--step=N", "what step N saw (steps count from 1, as in metrics.jsonl)"),
            "spike": Short("--spike[=K]", "what the K steps with the largest jumps of the loss saw (5)", bare="5"),
            "document": Short("--document=ID", "which steps saw a document"),
            "store": Short("--store=DIR", "the run's token store, where it has moved"),
            "corpus": Short("--corpus=DIR", "folder of `ctllm corpus`, for the URLs, where it has moved"),
            "text_chars": Short("--text_chars=N", "characters of text to show"),
            "json": Short("--json", "a JSON object a line instead of a table", bare="True"),
        },
        reads=True,
        mirrored=False,
    ),
    "report": Verb(
        "ctllm_jax.metrics.report",
        "ReportConfig",
        "configs/report.py",
        "training runs, finished or not -> one page with their curves and where they differ",
        workdir="folder for report.html; without it the first run's",
        short={
            "smooth": Short("--smooth=SHARE", "of a training curve, for the mean around each of its points (0.02)"),
            "card": Short("--card", "a model card and a data card as well, of one run", bare="True"),
        },
        writes=False,
        bare=("runs", "RUN [RUN ...]"),
        mirrored=False,
    ),
    "quickstart": Verb(
        "ctllm_jax.quickstart", "QuickstartConfig", "configs/quickstart.py", "every stage, small, to a report page"
    ),
}
