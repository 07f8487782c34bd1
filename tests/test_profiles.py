"""docs/profiles.md: it is what its program writes, and each of its commands asks for the hosts of its layout."""

import pathlib
import shlex
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import profiles

from configs import hardware
from ctllm_jax.hardware import parse_slice
from launch import jobset, run, ship

EVERY = pytest.mark.parametrize("name", hardware.SLICES)


def options(command: str) -> tuple[str, dict]:
    """(target, its options) of a `ctllm launch` line."""
    words = shlex.split(command.replace("\\\n", " "))
    target, own = words[2], words[3 : words.index("--")]
    return target, run._options(target, run._target(target), own)


def test_the_page_is_what_the_program_writes_now():
    written = (profiles.ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    assert written == profiles.page(), "python benchmarks/profiles.py > docs/profiles.md"


@EVERY
def test_a_command_asks_for_the_hosts_of_its_layout(name):
    target, found = parse_slice(name), dict(map(options, profiles.commands(name, parse_slice(name))))
    devices = {"gke": jobset.shape(found["gke"]).processes * max(jobset.shape(found["gke"]).resource.values())}
    if target.chip.platform == "tpu":
        assert set(found) == {"tpu", "gke"}
        one = parse_slice(found["tpu"]["type"])
        assert (one.chip, one.shape, found["tpu"]["slices"]) == (target.chip, target.shape, target.count)
        assert jobset.shape(found["gke"]).groups == target.count
    else:
        assert set(found) == {"ssh", "slurm", "gke"}
        per_node = {word for word in found["slurm"]["sbatch"].split() if word.startswith("--gpus-per-node")}
        assert per_node == {f"--gpus-per-node={min(target.chip.per_host, target.devices)}"}
        devices["slurm"] = found["slurm"]["nodes"] * min(target.chip.per_host, target.devices)
        assert all("XLA_CLIENT_MEM_FRACTION" in ship.variables(own["variables"]) for own in found.values())
    assert set(devices.values()) == {target.devices}


@EVERY
def test_a_figure_says_what_it_is(name):
    target, row = parse_slice(name), profiles.figures()[name]
    tokens, kind, days = profiles.expectation(target, row)
    assert ("measured" in kind) == (target.chip.name == "h200")
    per_second, least = float(tokens.replace(",", "")), float(days.removeprefix("at least "))
    assert profiles.TOKENS / per_second / 86_400 == pytest.approx(least, abs=0.06, rel=0.03)
    assert ("at least" in days) == ("at most" in row["tokens/s"] and "measured" not in kind)


def test_every_option_of_the_compiler_has_its_reason():
    assert set(profiles._options()) == set(profiles.REASONS)
