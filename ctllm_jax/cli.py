"""`ctllm VERB --config=FILE.py[:arg] --config.key=value --workdir=DIR`: one console script for every stage.

A verb is a module with a config dataclass and `run(config, workdir)`. It is imported when called, so that an
accelerator host never needs the corpus side's libraries.
"""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from ctllm_jax.common.config import build
from ctllm_jax.common.errors import UserError
from ctllm_jax.common.quiet import quiet_libraries

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Verb:
    """Where a verb lives, its config dataclass and default config file, and what it turns into what."""

    module: str
    config: str
    default: str | None
    help: str


VERBS = {
    "corpus": Verb(
        "data_pipeline.corpus",
        "CorpusConfig",
        "configs/corpus.py",
        "raw documents -> MAP-CC, rejects with every reason, report",
    ),
    "tokenizer": Verb(
        "data_pipeline.tokenizer",
        "TokenizerConfig",
        "configs/tokenizer.py",
        "MAP-CC -> SentencePiece model, fertility report",
    ),
    "tokenize": Verb(
        "data_pipeline.token_store",
        "TokenizeConfig",
        "configs/tokenize.py",
        "documents or conversations + tokenizer -> token store",
    ),
    "train": Verb(
        "ctllm_jax.train",
        "TrainConfig",
        None,  # a run is always named: configs/pretrain.py, configs/sft.py, configs/dpo.py
        "token store -> checkpoints: pretraining, SFT, DPO",
    ),
    "eval": Verb(
        "ctllm_jax.evaluate.run",
        "EvalConfig",
        "configs/eval.py",
        "checkpoint or Hugging Face folder + tasks -> scores",
    ),
    "generate": Verb("ctllm_jax.generate", "GenerateConfig", "configs/generate.py", "checkpoint + prompts -> text"),
    "convert": Verb(
        "ctllm_jax.convert", "ConvertConfig", "configs/convert.py", "run directory <-> Hugging Face folder"
    ),
    "quickstart": Verb(
        "ctllm_jax.quickstart", "QuickstartConfig", "configs/quickstart.py", "every stage, small, to a report page"
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `ctllm` script. Exit status: 0 done, 2 the user's to mend, 75 stopped and saved."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        _dispatch(argv)
    except UserError as error:
        print(f"ctllm: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ctllm: interrupted; run the same command to go on", file=sys.stderr)
        sys.exit(130)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if argv[0] not in VERBS:
        raise UserError(f"unknown verb {argv[0]!r}; there are: {', '.join(VERBS)}")
    verb = VERBS[argv[0]]
    values = _parse(argv[0], verb, argv[1:])
    if values is None:
        return
    data_side = verb.module.startswith("data_pipeline")
    with quiet_libraries() if data_side else contextlib.nullcontext():
        _execute(argv[0], verb, *values)


def _execute(name: str, verb: Verb, values: ConfigDict, workdir: str | None, show: bool) -> None:
    try:
        module = importlib.import_module(verb.module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("ctllm_jax", "data_pipeline", "configs"):
            raise
        raise UserError(f"{name} needs {error.name}: pip install 'ctllm-jax[data]'") from None
    config = build(getattr(module, verb.config), values.to_dict())
    if show:
        print(json.dumps(dataclasses.asdict(config), ensure_ascii=False, indent=1))
        return
    if not workdir:
        raise UserError(f"{name}: give --workdir=DIR, the folder that it writes")
    module.run(config, workdir)


def _parse(name: str, verb: Verb, arguments: list[str]) -> tuple[ConfigDict, str | None, bool] | None:
    """(config, workdir, print only?) from the command line, or None after --help."""
    values = flags.FlagValues()
    default = str(ROOT / verb.default) if verb.default else None
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"ctllm {name}: {verb.help}\n")
        print("  --config=FILE.py[:ARG]  config file; relative paths are looked for here, then in the repository")
        print("  --config.KEY=VALUE      sets one value of it")
        print("  --workdir=DIR           folder to write; a second run resumes or says why not")
        print("  --print_config          print the effective config and stop")
        print(f"\nDefault config: {verb.default or 'none, --config is required'}.")
        return None
    arguments = [_from_repository(argument) for argument in arguments]
    try:
        sys.argv = [name, *arguments]  # ml_collections reads the overrides of the default config from there
        config_flags.DEFINE_config_file("config", default, "", flag_values=values)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        flags.DEFINE_bool("print_config", False, "", flag_values=values)
        rest = values([name, *arguments])[1:]
        config = values.config
        if config is not None:
            config.to_dict()  # a file that could not be loaded raises here
    except OSError as error:
        raise UserError(f"{name}: cannot load the config file: {_last_line(error)}") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: {_plain(error)}") from None
    if rest:
        raise UserError(f"{name}: unexpected argument {rest[0]!r} (flags are written --name=value)")
    if config is None:
        raise UserError(f"{name}: give --config=FILE.py, one of configs/")
    return config, values.workdir, values.print_config


def _from_repository(argument: str) -> str:
    """Lets `--config=configs/NAME.py` work from any folder."""
    flag, _, value = argument.partition("=")
    path = value.partition(":")[0]
    if flag == "--config" and not pathlib.Path(path).exists() and (ROOT / path).is_file():
        return f"{flag}={ROOT / value}"
    return argument


def _plain(error: Exception) -> str:
    """The message of a key error without the quotes and escapes that Python wraps it in."""
    text = str(error.args[0] if error.args else error)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if "Traceback" in text:  # ml_collections hands on the whole of it
        return text.strip().splitlines()[-1]
    return text.replace("\\n", " ").replace("\n", " ").replace("\\'", "'")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _overview() -> str:
    lines = [f"  {name:<11} {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "ctllm VERB --config=FILE.py[:arg] [--config.key=value ...] --workdir=DIR [--print_config]",
            "",
            *lines,
            "",
            "ctllm VERB --help lists a verb's flags; configs/ holds the configs.",
        ]
    )


if __name__ == "__main__":
    main()
