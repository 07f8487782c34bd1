"""`ctllm plan`: what a training config takes on a slice, before anything is paid for."""

import dataclasses
import json

import jax

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import as_path, write_json
from ctllm_jax.hardware import Slice, parse_slice
from ctllm_jax.plan import arithmetic, search
from ctllm_jax.plan.compile import missing
from ctllm_jax.plan.estimate import Plan, make_plan
from ctllm_jax.plan.text import render, render_ranking
from ctllm_jax.train_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What `ctllm plan` reads."""

    train: TrainConfig  # the config of the run that is planned
    slice: str  # one or several, with commas
    tokens: float  # [billions of tokens] to train on; 0 takes the config's own steps
    compile: bool  # False leaves it at arithmetic
    search: bool  # rank meshes, remat policies and microbatches
    json: bool  # a JSON object a line instead of text

    def __post_init__(self):
        if not self.slice:
            raise ValueError("give --slice=NAME, such as v5e:16x16, v5p-128 or h200x8")
        if self.train.model is None:
            raise ValueError("model is None (init_from): give a config with an architecture")


def run(config: PlanConfig, workdir: str | None) -> dict:
    """Prints a plan for every slice; with a workdir, writes plan.json there as well.

    A config that does not fit is followed by the nearest one that does.
    """
    jax.config.update("jax_platforms", "cpu")  # no accelerator is touched, be there one or not
    plans: list[Plan] = []
    for name in config.slice.split(","):
        target = parse_slice(name)
        compiling = config.compile and missing(target) is None
        if config.search:
            ranking = search.rank(config.train, target, config.tokens)
            if compiling:
                ranking = search.prove(ranking, target, config.tokens)
            plans += [candidate.plan for candidate in ranking]
            _say(config, render_ranking(ranking, target))
            continue
        try:
            arithmetic.share(config.train, target)
        except (UserError, ValueError) as error:  # the mesh or the batch does not go on the slice
            _say(config, f"{target.name}: {error}")
            plans += _propose(config, target, compiling)
            continue
        plan = make_plan(config.train, target, tokens=config.tokens, compiling=compiling)
        plans.append(plan)
        _say(config, render(plan, _not_compiled(config, target)))
        if not plan.fits:
            plans += _propose(config, target, compiling)
    result = {"plans": [dataclasses.asdict(plan) for plan in plans]}
    if config.json:
        for plan in result["plans"]:
            print(json.dumps(plan))
    if workdir:
        write_json(as_path(workdir) / "plan.json", result)
    return result


def _propose(config: PlanConfig, target: Slice, compiling: bool) -> list[Plan]:
    nearest = search.nearest(config.train, target, config.tokens, compiling)
    if nearest is None:
        _say(config, f"Nothing that was tried fits {target.name}: take more or larger chips.")
        return []
    _say(config, f"The nearest that fits: {nearest.flags}")
    _say(config, render(nearest.plan, _not_compiled(config, target)))
    return [nearest.plan]


def _not_compiled(config: PlanConfig, target: Slice) -> str | None:
    """Why there is no compilation, if there is none."""
    return missing(target) if config.compile else "as --nocompile asks"


def _say(config: PlanConfig, text: str) -> None:
    if not config.json:
        print(text + "\n")
