"""The notebooks: clean files without logic of their own, and what their cells really show.

python tests/test_notebooks.py --clean    # takes out what running them left in the files
"""

import ast
import html
import importlib.util
import json
import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
OURS = ("configs", "ctllm_jax", "data_pipeline", "launch")
CELL_SECONDS = 900  # most that a cell may take
_NOT_A_READERS = ("JAX_NUM_CPU_DEVICES", "PYTEST_CURRENT_TEST")  # with the latter a kernel leaves its children unheard


def cleaned(text: str) -> str:
    """A notebook's file as it is committed: nothing of any run."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell.update(execution_count=None, outputs=[])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook["metadata"] = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def code(name: str) -> list[ast.Module]:
    cells = nbformat.read(FOLDER / f"{name}.ipynb", nbformat.NO_CONVERT).cells
    return [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]


# ---- The files


def test_there_are_six_and_each_is_listed_where_a_reader_looks():
    assert len(NOTEBOOKS) == 6
    for page, path in ((ROOT / "README.md", "notebooks/"), (ROOT / "docs" / "notebooks.md", "../notebooks/")):
        listed = re.findall(rf"\]\({re.escape(path)}(\w+)\.ipynb\)", page.read_text(encoding="utf-8"))
        assert sorted(set(listed)) == NOTEBOOKS, page


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_without_a_trace_of_a_run(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    nbformat.validate(nbformat.reads(text, nbformat.NO_CONVERT))
    assert text == cleaned(text), f"python {pathlib.Path(__file__).relative_to(ROOT)} --clean"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_logic_lives_in_a_notebook(name):
    own = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.While, ast.Try, ast.If)
    assert not [ast.unparse(node) for cell in code(name) for node in ast.walk(cell) if isinstance(node, own)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_a_notebook_imports_is_there(name):
    for node in (node for cell in code(name) for node in ast.walk(cell)):
        if isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            assert {alias.name for alias in node.names} <= names_in(node.module), ast.unparse(node)


def names_in(module: str) -> set[str]:
    """What can be imported from a module of ours, without running it."""
    path = ROOT.joinpath(*module.split("."))
    if path.is_dir():
        return {inside.stem for inside in path.iterdir()}
    body = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8")).body
    defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assigned = (name for node in body if isinstance(node, ast.Assign) for name in ast.walk(node))
    return defined | {name.id for name in assigned if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(name):
    cells = nbformat.read(FOLDER / f"{name}.ipynb", nbformat.NO_CONVERT).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert not [link for link in links if not (FOLDER / link).exists()]


# ---- What they show


class Shown:
    """What an executed notebook shows."""

    def __init__(self, notebook: nbformat.NotebookNode):
        self._cells = [cell for cell in notebook.cells if cell.cell_type == "code"]

    def _outputs(self, part: str) -> list[nbformat.NotebookNode]:
        """Of the first cell that has this in it."""
        return next(cell.outputs for cell in self._cells if part in cell.source)

    def of(self, part: str) -> str:
        """What that cell shows: text as it is, HTML without its marks."""
        return "\n".join(map(_said, self._outputs(part)))

    def drawings(self, part: str) -> list[str]:
        """The drawings of that cell, as SVG."""
        pages = (output.get("data", {}).get("text/html", "") for output in self._outputs(part))
        return [drawing for page in pages for drawing in re.findall(r"<svg.*?</svg>", page, re.S)]

    def value(self, part: str):
        """That cell's last value, where it is written as Python writes it."""
        [result] = [output for output in self._outputs(part) if output.output_type == "execute_result"]
        return ast.literal_eval(result.data["text/plain"])


def _said(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return output.text
    assert output.output_type != "error"
    page = output.data.get("text/html")
    if page is None:
        return output.data["text/plain"]
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return html.unescape(re.sub(r"\s*<[^>]*>\s*", " ", page))


def executed(name: str, folder: pathlib.Path) -> Shown:
    """Runs a notebook as a reader would who has `notebooks/` inside this folder; its results go beside that."""
    (folder / "notebooks").mkdir(exist_ok=True)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    place = {"metadata": {"path": str(folder / "notebooks")}}
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_A_READERS}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=place).execute(env=environment)
    return Shown(notebook)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Where all of them work, one after the other: each goes on from what the ones before have made."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
def test_a_corpus_is_built_and_looked_into(folder):
    shown = executed("1_corpus", folder)
    assert "475 records read, 385 documents kept" in shown.of('run("corpus"')
    funnel = shown.of('parts["Funnel"]')
    assert "near dedup" in funnel and "CT-LLM" in funnel and "zh_papers" in funnel
    assert len(shown.drawings("Why documents were rejected")) == 1
    story = shown.of('run("explain"')
    assert "zh_cc-p023: rejected" in story and "because of  top_3gram, top_4gram" in story
    assert "line 28, as zh_cc" in story and "duplicate_5gram" in story and story.count("BROKEN") == 8
    broken = shown.value('if rule["broken"]')
    assert len(broken) == 8 and broken[0] == {"rule": "top_3gram", "value": 0.265823, "broken": True, "max": 0.2}
    assert "code-0009: stays" in shown.of('parts["Duplicates"]')
    assert "code-p005: near duplicate, similarity 0.86" in shown.of('parts["Duplicates"]')
    assert len(shown.drawings("histograms(report")) == 4
    assert "*50: 99.15/87.29" in shown.of('run("sweep"')


@pytest.mark.slow
def test_a_model_is_trained_sampled_and_inspected(folder):
    shown = executed("2_train", folder)
    fertility = shown.value('run("tokenizer"')
    assert fertility["en"] > 2 > fertility["zh_cc"] > 1
    tokens = shown.value('run("tokenize"')
    assert tokens["train"] > 80_000 and tokens["validation"] > 8_000
    bits = float(re.search(r"([\d.]+) bits a byte", shown.of('run("train"')).group(1))
    assert 2.5 < bits < 3.15  # a unigram model has 3.19
    assert len(shown.drawings('"bits_per_byte")')) == 3
    assert "春天来了，" in shown.of('["Samples"]') and "At all steps" in shown.of('["Samples"]')
    assert "--- 从前有座山，" in shown.of('run("generate"')
    assert "春天" in shown.of("drawn(tokens)") and "weather" in shown.of("drawn(tokens)").replace(" ", "")
    for text, nats, guesses in shown.value("token.guesses"):
        assert text and nats > 0 and len(guesses) == 3 and 1 >= guesses[0][1] >= guesses[1][1]
    assert shown.value("jnp.shape")["layers"]["gate"] == (2, 128, 344)


@pytest.mark.slow
def test_a_run_is_watched_and_compared_with_another(folder):
    shown = executed("3_watch", folder)
    assert "runs in the background" in shown.of("detach=True")
    assert "slow: finished; 31 lines" in shown.of("follow(") and len(shown.drawings("follow(")) == 2
    overview = shown.of('parts["Runs"]')
    assert "optimizer.learning_rate  0.003  0.0003" in overview and "model.num_layers" not in overview
    assert len(shown.drawings('"grad_norm")')) == 4
    assert "small" in shown.of("Where the time went") and "slow" in shown.of("Where the time went")
    assert (folder / "runs" / "notebooks" / "compared" / "report.html").is_file()


@pytest.mark.slow
def test_a_spike_is_traced_to_the_documents_that_made_it(folder):
    shown = executed("4_trace", folder)
    assert "step 16: loss " in shown.of("spike=1") and "http://dictionary.example.com/1" in shown.of("spike=1")
    most = shown.value("sites.count")
    assert most[0] == (5, "dictionary.example.com") and most[1][0] < 5
    seen = shown.of('document="index-2"')
    assert len(re.findall(r"  16 .* index-2 ", seen)) and " zh_baike " not in seen
    story = shown.of('run("explain"')
    assert "index-2: kept" in story and "index.jsonl, line 3, as zh_cc" in story and "BROKEN" not in story
    kept = re.search(r"zh_cc: 122 documents.*\n  character_entropy max  .*5\.5: ([\d.]+)/", shown.of('run("sweep"'))
    assert float(kept.group(1)) == pytest.approx(100 * (1 - 4 / 122), abs=0.01)  # the four pages


@pytest.mark.slow
def test_checkpoints_are_evaluated_and_compared(folder):
    shown = executed("5_evaluate", folder)
    scores = shown.of('run("eval"')
    assert all(f"model small@{step} " in scores for step in (15, 30, 45, 60))
    assert len(shown.drawings("line_chart")) == 1 and "unigram" in shown.of("line_chart")
    compared = shown.of('run("compare"')
    assert "A: small@15" in compared and "B: small@60" in compared
    texts = re.search(r"^conversations +200 +([\d.]+) +([\d.]+) +-[\d.]+ .*bootstrap, bits_per_byte$", compared, re.M)
    assert float(texts.group(2)) < float(texts.group(1)) - 0.1
    assert re.search(r"^sample_choice +60 .*McNemar", compared, re.M)


@pytest.mark.slow
def test_a_config_becomes_a_job(folder):
    shown = executed("6_launch", folder)
    line = shown.of("shlex.join")
    assert "ctllm train --config=configs/pretrain.py:tiny --config.data.store=" in line and "num_layers" not in line
    said = shown.of("processes=2")
    assert "[0] " in said and said.rstrip().endswith("\n0") and "12/12 steps" in said
    assert shown.value("everything()")[-1][1:] == ("local", 0)
    assert len(shown.drawings("read_runs(")) == 1
    assert "v5e" in shown.of('run("plan"')
    batch = shown.of('"slurm"')
    assert (
        "#SBATCH --nodes=8" in batch and "sbatch --parsable --partition=gpu" in batch and batch.rstrip().endswith("\n0")
    )
    slices = shown.of('"tpu"')
    assert "gcloud compute tpus queued-resources create ct-llm" in slices and "--spot" in slices


if __name__ == "__main__":
    for path in FOLDER.glob("*.ipynb"):
        path.write_text(cleaned(path.read_text(encoding="utf-8")), encoding="utf-8")
