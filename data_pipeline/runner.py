"""The Beam runner: one place that decides where pipelines run.

`local` is FnApiRunner, named explicitly: Beam's default DirectRunner first tries to download Prism. It works
in memory unless the options say otherwise (`--direct_running_mode=multi_processing --direct_num_workers=N`).
docs/beam.md has the options of every runner that was tried.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, PrismRunnerOptions
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc
from apache_beam.runners.portability import fn_api_runner
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.utils import interactive_utils

from ctllm_jax.common.errors import UserError

_SECONDS_TO_ANSWER = 10

# The local runner's workers in threads send what they have every second, from a thread that may cut an element that is
# just being written in two: what is then read is other values, or counts of billions. They send by size alone instead,
# as Beam's workers do everywhere else.
worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = 0

# In a notebook Beam looks for the pipelines of its cells, to name their steps after them, and needs libraries of its
# `interactive` extra for that. Ours are no cell's.
for _module in (interactive_utils, sys.modules["apache_beam.pipeline"]):
    _module.is_in_ipython = lambda: False

# What the user can mend is said once, at the end and without a traceback; Beam logs one wherever a step fails.
logging.getLogger("apache_beam.runners.common").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], UserError))
)
_STEP = " [while running "  # Beam puts it behind the message of what a step raises
_SAID_ELSEWHERE = re.compile(rf".*^[\w.]*\bUserError: (.*?){re.escape(_STEP)}", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """runner: 'local' or the name of any Beam runner; options: its pipeline options, as on a command line."""

    runner: str
    options: tuple[str, ...] = ()


def make_runner(config: BeamConfig) -> beam.runners.PipelineRunner:
    """The runner.

    Raises:
      UserError: Beam does not know it or lacks its libraries, it is known to lose data, or no job service answers.
    """
    if config.runner == "local":
        return fn_api_runner.FnApiRunner()
    if config.runner.lower().startswith("dask"):
        raise UserError("beam.runner: Beam's DaskRunner silently loses outputs; choose another")
    if "dataflow" in config.runner.lower() and importlib.util.find_spec("apitools") is None:
        raise UserError(
            "beam.runner: Beam lacks its libraries for Google Cloud here, and would try for minutes to do without; "
            "pip install -c requirements.lock 'ctllm-jax[data,dataflow]'"
        )
    try:
        runner = beam.runners.create_runner(config.runner)
    except (ValueError, ImportError) as error:
        raise UserError(f"beam.runner: {config.runner!r} is no Beam runner here ({error})") from None
    if isinstance(runner, PortableRunner):
        _check_service(config)
    return runner


def _check_service(config: BeamConfig) -> None:
    """Asks the job service that the options name, if they do; Beam itself waits five minutes for one."""
    options = make_options(config).view_as(PortableOptions)
    endpoint, kind = options.job_endpoint, config.runner.rpartition(".")[2]
    if kind == "PortableRunner" and not (endpoint and options.environment_type):
        raise UserError(
            "beam.options: PortableRunner needs --job_endpoint=HOST:PORT of a job service and --environment_type "
            "(EXTERNAL, LOOPBACK, PROCESS, or DOCKER with an image that has ctllm-jax); docs/beam.md has examples"
        )
    if kind == "PrismRunner" and not (endpoint or options.view_as(PrismRunnerOptions).prism_location):
        raise UserError(
            "beam.options: PrismRunner needs --prism_location=FILE or --job_endpoint=HOST:PORT; Beam would download a "
            "program without checking it. docs/beam.md says how to build it"
        )
    if not endpoint or endpoint == "embed":
        return
    with grpc.insecure_channel(endpoint) as channel:
        service = beam_job_api_pb2_grpc.JobServiceStub(channel)
        try:
            service.DescribePipelineOptions(
                beam_job_api_pb2.DescribePipelineOptionsRequest(), timeout=_SECONDS_TO_ANSWER
            )
        except grpc.RpcError as error:
            raise UserError(
                f"beam.options: no Beam job service answers at --job_endpoint={endpoint} "
                f"({error.code().name.lower()}: {error.details()}); start it first"
            ) from None


def make_options(config: BeamConfig) -> PipelineOptions:
    """The pipeline options."""
    return PipelineOptions(list(config.options))


@contextlib.contextmanager
def make_pipeline(config: BeamConfig) -> Iterator[beam.Pipeline]:
    """A pipeline, which runs as the block ends.

    Raises:
      UserError: as `make_runner`; or one that a step raised, in whatever process, as it was raised.
    """
    try:
        with beam.Pipeline(runner=make_runner(config), options=make_options(config)) as pipeline:
            yield pipeline
    except UserError as error:
        raise UserError(str(error).partition(_STEP)[0]) from None
    except RuntimeError as error:  # of another process there is the text of its traceback
        if found := _SAID_ELSEWHERE.search(str(error)):
            raise UserError(found.group(1)) from None
        raise
