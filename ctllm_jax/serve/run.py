"""`ctllm serve`: a checkpoint behind HTTP until Ctrl-C or SIGTERM; a second signal ends it at once."""

import asyncio
import signal
import sys

from ctllm_jax.common.errors import UserError
from ctllm_jax.loading import load_model
from ctllm_jax.serve.config import ServeConfig
from ctllm_jax.serve.server import Server
from ctllm_jax.serve.worker import warm_up
from ctllm_jax.slots import Decoder
from ctllm_jax.stopping import ECHO


def run(config: ServeConfig, workdir: str | None) -> dict:
    """Serves until it is stopped. `workdir` is not used.

    Raises:
      UserError: the model cannot be loaded, or the address cannot be had.
      RuntimeError: the model failed while it served.
    """
    if not config.model:
        raise UserError("serve: give --config.model=RUN (a run directory or a Hugging Face folder)")
    model = load_model(config.model, config.step, config.dtype, config.tensor)
    decoder = Decoder(model, config.slots, config.context)
    warm_up(decoder)
    if not asyncio.run(_serve(Server(decoder, config), config.name or model.name)):
        raise RuntimeError("the model failed; the error is above")
    return {"model": model.name}


async def _serve(server: Server, name: str) -> bool:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def ask_to_stop() -> None:
        if stop.is_set():
            return
        print("serve: finishing what is running; again to end at once", file=sys.stderr)
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.call_later(ECHO, loop.remove_signal_handler, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask_to_stop)

    def ready(host: str, port: int) -> None:
        print(f"serve: {name} on http://{host}:{port}/v1", file=sys.stderr, flush=True)

    return await server.run(stop, ready)
