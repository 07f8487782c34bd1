"""Work spread over the local devices: each, or each group over which a copy of the model is split, takes the next job
when it is free.

A job is worked on by one of them, as if there were no other: so their number changes no bit of its result, none waits
for another, and what devices would have to share (a beginning that many rows go on from, a loop that ends with the
last of its rows) stays with one. The price is that each device compiles its own programs; they do so at the same time.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ctllm_jax.loading import LoadedModel

Job, Result = TypeVar("Job"), TypeVar("Result")


def on_each_device(model: LoadedModel) -> list[LoadedModel]:
    """The model for each local device, its parameters there; where there is one device only, the model itself.

    Of a model that is split there is a copy for each group of as many devices; what is left over does nothing.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        return [model]
    if model.mesh is None:
        return [dataclasses.replace(model, params=jax.device_put(model.params, device)) for device in devices]
    size = model.mesh.size
    return [
        _moved(model, np.reshape(devices[first : first + size], model.mesh.devices.shape))
        for first in range(0, len(devices) - size + 1, size)
    ]


def _moved(model: LoadedModel, devices: np.ndarray) -> LoadedModel:
    """The model split over other devices in the same way."""
    mesh = Mesh(devices, model.mesh.axis_names, axis_types=model.mesh.axis_types)
    places = jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.sharding.spec), model.params)
    return dataclasses.replace(model, params=jax.device_put(model.params, places), mesh=mesh)


def spread(
    models: Sequence[LoadedModel], work: Callable[[LoadedModel, Job], Result], jobs: Iterable[Job]
) -> Iterator[Result]:
    """`work(model, job)` of each job, as they come to their end.

    Args:
      models: as `on_each_device` gives them. Each has a thread and one job at a time; a single one works in the
        caller's thread, through the jobs in their order.
      work: what it raises is raised here, once the jobs at hand have come to their end; no other is begun.
      jobs: taken when a model is free for the next one.
    """
    if len(models) == 1:
        yield from (work(models[0], job) for job in jobs)
        return
    free = list(models)
    busy: dict[concurrent.futures.Future, LoadedModel] = {}

    def ended() -> Iterator[Result]:
        for future in concurrent.futures.wait(busy, return_when=concurrent.futures.FIRST_COMPLETED).done:
            free.append(busy.pop(future))
            yield future.result()

    with concurrent.futures.ThreadPoolExecutor(len(models)) as pool:
        for job in jobs:
            if not free:
                yield from ended()
            model = free.pop(0)
            busy[pool.submit(work, model, job)] = model
        while busy:
            yield from ended()
