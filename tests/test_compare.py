"""Two evaluations on the same items: McNemar's test, the paired bootstrap, and what cannot be compared."""

import json
import pathlib

import numpy as np
import pytest
from tiny_models import write_jsonl

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.manifest import open_stage
from ctllm_jax.evaluate.compare import CompareConfig, compare, holm, run

CHOICE = {"kind": "ppl", "headline": "ppl", "protocol": "p"}


def picks(hits: list[int]) -> list[dict]:
    return [{"id": str(i), "gold": 1, "picked": {"ppl": hit}} for i, hit in enumerate(hits)]


def evaluation(folder: pathlib.Path, benchmarks: dict[str, tuple[dict, list[dict]]]) -> str:
    """A finished folder of `ctllm eval` with these logs, in blocks of 10."""
    stage = open_stage("eval", 2, str(folder), {}, {"model": folder.name})
    for name, (_, log) in benchmarks.items():
        for start in range(0, len(log), 10):
            path = folder / "parts" / name / f"all-{start // 10:04d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, log[start : start + 10])
    stage.finish({"model": folder.name, "benchmarks": {name: about for name, (about, _) in benchmarks.items()}})
    return str(folder)


def test_mcnemars_exact_test():
    a = [1] * 50 + [1] * 2 + [0] * 10 + [0] * 38
    b = [1] * 50 + [0] * 2 + [1] * 10 + [0] * 38
    found = compare(CHOICE, [picks(a), picks(b)], 2_000)
    assert (found["test"], found["only_a"], found["only_b"], found["n"]) == ("McNemar", 2, 10, 100)
    # 2 * (C(12,0) + C(12,1) + C(12,2)) / 2^12
    assert found["p"] == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert (found["a"], found["b"]) == (0.52, 0.60) and found["difference"] == pytest.approx(0.08)
    half = 1.96 * np.subtract(b, a).std() / 10
    assert found["interval"] == pytest.approx([0.08 - half, 0.08 + half], abs=0.012)
    assert compare(CHOICE, [picks(a), picks(a)], 10)["p"] == 1.0
    lost = [{**entry, "gold": None} for entry in picks(a)]  # an item without a readable answer is right for nobody
    assert compare(CHOICE, [lost, lost], 10)["a"] == 0


def test_the_paired_bootstrap_sees_what_pairs_show():
    random = np.random.default_rng(0)
    a = random.normal(0.5, 0.3, 200)
    log = lambda values: [{"id": i, "right": {"f1": float(value)}} for i, value in enumerate(values)]  # noqa: E731
    about = {"kind": "generate", "headline": "f1"}
    found = compare(about, [log(a), log(a + random.normal(0.02, 0.02, 200))], 1_000)
    assert found["test"] == "bootstrap" and found["p"] == 1 / 1_000 and found["interval"][0] > 0.01
    assert compare(about, [log(a), log(a + random.normal(0, 0.3, 200))], 1_000)["p"] > 0.01


def test_bits_per_byte_are_of_all_bytes():
    logs = [
        [{"id": i, "logprob": -np.log(2) * bits, "bytes": size} for i, (bits, size) in enumerate(own)]
        for own in ([(8, 4), (30, 10)], [(6, 4), (22, 10)])
    ]
    found = compare({"kind": "rolling"}, logs, 100)
    assert (found["a"], found["b"]) == pytest.approx((38 / 14, 28 / 14))
    assert found["difference"] == pytest.approx(-10 / 14) and found["metric"] == "bits_per_byte"


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_two_folders(tmp_path, capsys):
    random = np.random.default_rng(1)
    a, b = (picks(random.integers(0, 2, 35).tolist()) for _ in range(2))
    one = evaluation(tmp_path / "one", {"x": (CHOICE, a), "y": (CHOICE, a), "z": (CHOICE, a)})
    other = evaluation(tmp_path / "other", {"x": (CHOICE, b), "y": ({**CHOICE, "protocol": "q"}, b)})
    result = run(CompareConfig((one, other), 100), str(tmp_path / "out"))
    assert list(result["benchmarks"]) == ["x"] and result["benchmarks"]["x"]["n"] == 35
    assert result["left_out"].keys() == {"y", "z"} and "only one" in result["left_out"]["z"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8")) == result
    out = capsys.readouterr().out
    assert "McNemar, ppl" in out and "y: left out, the protocol" in out

    limited = evaluation(tmp_path / "limited", {"x": (CHOICE, b[:20])})
    with pytest.raises(UserError, match=r"x: the items are not the same \(35 and 20\)"):
        run(CompareConfig((one, limited), 100), None)
    empty = evaluation(tmp_path / "empty", {"w": (CHOICE, b)})
    with pytest.raises(UserError, match="nothing can be compared .*only one evaluation has it"):
        run(CompareConfig((one, empty), 100), None)
    with pytest.raises(UserError, match="not a finished folder of `ctllm eval`"):
        run(CompareConfig((one, str(tmp_path / "nowhere")), 100), None)
