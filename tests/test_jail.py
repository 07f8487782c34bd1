"""Programs that a model wrote: reference solutions pass, and nothing that a program tries does harm."""

import gzip
import json
import os
import shutil
import socket
import subprocess

import pytest
from tiny_models import NO_REFERENCE, REFERENCE

from ctllm_jax.common.errors import UserError
from ctllm_jax.evaluate import jail, run
from ctllm_jax.evaluate.benchmark import judged
from ctllm_jax.evaluate.declarations import Benchmark, Item, load_task
from ctllm_jax.evaluate.jail import Limits, run_programs
from ctllm_jax.evaluate.rows import PREPARE

needs_isolation = pytest.mark.skipif(jail.isolated() is not None, reason=f"no isolation here: {jail.isolated()}")
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=NO_REFERENCE)
LIMITS = Limits(cpu_seconds=5, wall_seconds=60)
SHORT = Limits(cpu_seconds=1, wall_seconds=3)


@needs_isolation
def test_a_program_passes_when_it_runs_to_its_end():
    programs = {
        "import math\nassert math.sqrt(4) == 2": True,
        "open('own.txt', 'w').write('x')\nassert open('own.txt').read() == 'x'": True,
        "import os\nassert os.getuid() == 65534 and os.getpid() == 1": True,
        "assert False": False,
        "import sys\nsys.exit(0)": False,
        "import os\nos._exit(0)": False,
        "def f(:": False,
    }
    assert run_programs(list(programs), LIMITS) == list(programs.values())


CHINESE = "def 加(甲, 乙):\n    return 甲 + 乙\nassert 加('中', '文') == '\\u4e2d\\u6587'"


@pytest.mark.parametrize("language", ["zh_CN.GBK", "C", "C.UTF-8"])
def test_a_program_is_the_same_in_every_locale(language, tmp_path, monkeypatch):
    """C has Python read UTF-8 by itself; GBK is made here, for few machines have it."""
    if language == "zh_CN.GBK":
        made = shutil.which("localedef") and subprocess.run(
            ["localedef", "-i", "zh_CN", "-f", "GBK", str(tmp_path / language)], capture_output=True, check=False
        )
        if not made or made.returncode:
            pytest.skip("no locale of GBK can be made here (localedef, and Debian's package locales)")
        monkeypatch.setenv("LOCPATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", language)
    programs = [CHINESE, CHINESE.replace("中", "国")]
    assert run_programs(programs, LIMITS, isolate=False) == [True, False]
    if jail.isolated() is None:
        assert run_programs(programs, LIMITS) == [True, False]


@needs_isolation
def test_nothing_that_a_program_tries_does_harm(tmp_path):
    tmp_path.chmod(0o777)
    precious = tmp_path / "precious"
    precious.write_text("x")
    precious.chmod(0o666)
    server = socket.create_server(("127.0.0.1", 0))
    attempts = [
        f"import os\nos.remove({str(precious)!r})",
        f"open({str(precious)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "import ctypes\nassert ctypes.CDLL(None).mount(None, b'/', None, 32 | 4096, None) == 0",
        "import socket\nsocket.create_connection(('1.1.1.1', 53), 2)",
        f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)",
        f"import os, signal\nos.kill({os.getpid()}, signal.SIGKILL)",
        "x = bytearray(100 * 2**30)",
        "open('large', 'wb').write(bytes(200 * 2**20))",
    ]
    with server:
        assert run_programs(attempts, LIMITS) == [False] * len(attempts)
    assert precious.read_text() == "x" and not (tmp_path / "new").exists()


@needs_isolation
def test_what_does_not_end_is_ended_with_all_that_it_started():
    mark = f"mark-{os.getpid()}"
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    sleeper = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600) # {mark}'])"
    assert run_programs(["while True: pass", bomb, sleeper], SHORT) == [False] * 3
    left = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if mark in _command(pid)]
    assert left == []


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def solutions(name: str) -> tuple:
    """(task, items, the reference solutions as extracted answers) of a code task."""
    file = {"humaneval": "humaneval/HumanEval.jsonl.gz", "mbpp": "mbpp/mbpp.jsonl.gz"}[name]
    with gzip.open(REFERENCE.parent / "eval" / file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if name == "mbpp":
        rows = [PREPARE["mbpp"](row)[0] for row in rows[10:510]]
    items = [Item(str(number), "", row, None, ()) for number, row in enumerate(rows)]
    return (
        load_task(f"{name}_gen"),
        items,
        [row["canonical_solution" if name == "humaneval" else "code"] for row in rows],
    )


@needs_isolation
@needs_reference
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_a_few_reference_solutions_pass(name):
    task, items, answers = solutions(name)
    assert judged(task, "accuracy", items[:5], answers[:5], isolate=True) == [1.0] * 5
    assert judged(task, "accuracy", items[:2], ["    return 'no'"] * 2, isolate=True) == [0.0] * 2


@needs_isolation
@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_every_reference_solution_passes(name):
    task, items, answers = solutions(name)
    found = judged(task, "accuracy", items, answers, isolate=True)
    assert [item.fields["task_id"] for item, right in zip(items, found, strict=True) if not right] == []
    assert len(found) == {"humaneval": 164, "mbpp": 500}[name]


def test_without_isolation_code_tasks_refuse_unless_told(monkeypatch):
    code = [Benchmark(load_task("humaneval_gen"), {}, {}, "")]
    monkeypatch.setattr(run, "isolated", lambda: "unshare: Operation not permitted")
    with pytest.raises(UserError, match="humaneval_gen: programs .* cannot be isolated here .unshare: Operation"):
        run._isolation(code, unsafe=False)
    assert run._isolation(code, unsafe=True) is False
    assert run._isolation([Benchmark(load_task("gsm8k_gen"), {}, {}, "")], unsafe=False) is True
    assert run_programs(["import os\nassert os.getpid() != 1", "assert 0"], LIMITS, isolate=False) == [True, False]
