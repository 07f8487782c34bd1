"""The documents: links lead somewhere, commands parse, snippets run, translations have the same commands."""

import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from ctllm_jax import cli
from ctllm_jax.common.config import build
from ctllm_jax.evaluate.declarations import load_task
from ctllm_jax.verbs import VERBS
from launch import run as launch
from launch import view

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "README.zh.md", *(ROOT / "docs").rglob("*.md")])
GUIDES = [page for page in PAGES if page.name not in ("log.md", "design.md")]  # those tell of past or inner things
TRANSLATED = [("README.md", "README.zh.md"), ("docs/tutorial.md", "docs/tutorial.zh.md")]
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
guides = pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str, kind: str) -> list[str]:
    return [body for name, body in _FENCE.findall(text) if name == kind]


def commands(text: str) -> list[str]:
    """The `ctllm` lines of a page's blocks, and those with flags in the running text, which say only what matters."""
    shown = [line.strip() for body in blocks(text, "") for line in body.replace("\\\n", " ").splitlines()]
    inline = [" ".join(found.split()) + " ..." for found in re.findall(r"`(ctllm [^`]*--[^`]*)`", _FENCE.sub("", text))]
    return [line for line in [*shown, *inline] if line.startswith("ctllm ")]


# ---- Links


def anchors(page: pathlib.Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").strip().lower()).replace(" ", "-") for head in heads}


@names
def test_links_lead_to_files_and_headings(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_every_page_can_be_reached_from_the_front_door():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        found = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        waiting += [(page.parent / target).resolve() for target in found if "://" not in target]
    assert not set(PAGES) - seen


# ---- Commands


@guides
def test_commands_parse_against_their_configs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in commands(page.read_text(encoding="utf-8")):
        check(line)


def check(line: str) -> None:
    """Raises UserError where a line's verb, flags, keys or values are not there; `...` stands for what is left out."""
    line = line.replace("SLICE", "v5e:4x4")
    words = [word for word in shlex.split(line, comments=True) if word != "..."][1:]
    if words[0] == "launch":
        check_launch(words[1:])
    elif "VERB" not in words:
        check_verb(words, whole="..." not in line)


def check_verb(words: list[str], whole: bool) -> None:
    name, *arguments = words
    assert name in VERBS, name
    verb = VERBS[name]
    parsed = cli.parse(name, verb, arguments)
    if parsed is not None and whole:
        build(getattr(importlib.import_module(verb.module), verb.config), parsed[0])


def check_launch(words: list[str]) -> None:
    name, *rest = words
    if name in view.FORMS:
        return
    own, payload = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    if name == "TARGET":
        assert payload[0] == "VERB"
        return
    launch._options(name, launch._target(name), own)
    if len(payload) > 1:
        check_verb(payload, whole=False)


def test_a_wrong_command_would_be_found():
    for wrong in (
        "ctllm corpus --config.inputs=x",
        "ctllm nosuch --x=1",
        "ctllm train --config.batch_size=4 --workdir=R",
    ):
        with pytest.raises((cli.UserError, AssertionError)):
            check(wrong)


# ---- Snippets


@guides
def test_declarations_of_tasks_are_declarations(page, tmp_path):
    for number, body in enumerate(blocks(page.read_text(encoding="utf-8"), "toml")):
        (tmp_path / f"{number}.toml").write_text(body, encoding="utf-8")
        assert tomllib.loads(body) and load_task(str(tmp_path / f"{number}.toml")).files


@guides
def test_python_runs_in_the_repository(page, tmp_path):
    for name in ("sample", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for body in blocks(page.read_text(encoding="utf-8"), "python"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", body], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED)
def test_a_translation_has_the_same_commands_and_links(english, chinese):
    first, second = ((ROOT / name).read_text(encoding="utf-8") for name in (english, chinese))
    bare = [[re.sub(r"\s+#.*", "", line) for line in commands(text)] for text in (first, second)]
    assert bare[0] == bare[1]
    targets = [
        set(re.findall(r"\]\(([^)\s#]+)", text)) - {english.split("/")[-1], chinese.split("/")[-1]}
        for text in (first, second)
    ]
    assert {target.replace(".zh.md", ".md") for target in targets[0]} == {
        t.replace(".zh.md", ".md") for t in targets[1]
    }
