"""The Beam runner: one place that decides where pipelines run.

`local` is FnApiRunner, named explicitly: Beam's default DirectRunner first tries to download Prism. It works
in memory unless the options say otherwise (`--direct_running_mode=multi_processing --direct_num_workers=N`).
"""

import dataclasses
import sys

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability import fn_api_runner
from apache_beam.utils import interactive_utils

from ctllm_jax.common.errors import UserError

# In a notebook Beam looks for the pipelines of its cells, to name their steps after them, and needs libraries of its
# `interactive` extra for that. Ours are no cell's.
for _module in (interactive_utils, sys.modules["apache_beam.pipeline"]):
    _module.is_in_ipython = lambda: False


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """runner: 'local' or the name of any Beam runner; options: its pipeline options, as on a command line."""

    runner: str
    options: tuple[str, ...] = ()


def make_runner(config: BeamConfig) -> beam.runners.PipelineRunner:
    """The runner; UserError if Beam does not know it, or if it is known to lose data."""
    if config.runner == "local":
        return fn_api_runner.FnApiRunner()
    if config.runner.lower().startswith("dask"):
        raise UserError("beam.runner: Beam's DaskRunner silently loses outputs; choose another")
    try:
        return beam.runners.create_runner(config.runner)
    except (ValueError, ImportError) as error:
        raise UserError(f"beam.runner: {config.runner!r} is no Beam runner here ({error})") from None


def make_options(config: BeamConfig) -> PipelineOptions:
    """The pipeline options."""
    return PipelineOptions(list(config.options))


def make_pipeline(config: BeamConfig) -> beam.Pipeline:
    """A pipeline; use as a context manager, which runs it."""
    return beam.Pipeline(runner=make_runner(config), options=make_options(config))
