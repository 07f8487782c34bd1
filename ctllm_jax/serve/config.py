"""What a server may take up."""

import dataclasses

from ctllm_jax.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What `ctllm serve` reads."""

    model: str  # run directory or Hugging Face folder
    step: int | None  # [steps] checkpoint of a run; None is the newest
    dtype: str | None  # compute dtype; None is the model's own
    tensor: int  # [devices] over which heads and widths of a copy of the model are split
    name: str | None  # what clients call the model; None is the folder's name, with the step of a run
    host: str  # who may connect: 127.0.0.1 is this machine alone; the server asks nobody who they are
    port: int  # [port] 0 takes a free one
    slots: int  # [requests] that are answered together; each holds a cache of `context` tokens
    context: int | None  # [tokens] most tokens of a prompt and its answer; None is the model's
    queue: int  # [requests] most requests that wait for a slot; further ones get status 429
    connections: int  # [connections] at a time
    body_bytes: int  # [bytes] of a request
    header_seconds: float  # [s] for a request's header, for its body, until the client reads on, between requests
    seconds: float  # [s] for an answer, from its request on
    stop_seconds: float  # [s] for what is running when the server is stopped
    sampling: SamplingConfig  # where a request does not say; requests without a seed get different random numbers

    def __post_init__(self):
        if min(self.slots, self.connections, self.body_bytes) < 1 or self.queue < 0 or not 0 <= self.port < 65_536:
            raise ValueError("a server needs slots, connections and body_bytes, a queue and a port of 0 to 65535")
        if min(self.header_seconds, self.seconds) <= 0 or self.stop_seconds < 0:
            raise ValueError("header_seconds and seconds must be above 0, stop_seconds at least 0")
