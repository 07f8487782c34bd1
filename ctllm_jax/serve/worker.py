"""The decoder in a thread of its own, behind a line of bounded length."""

import threading
import time
import traceback
from collections.abc import Callable

from ctllm_jax.sampling import SamplingConfig
from ctllm_jax.slots import Decoder, Request

FAILED, STOPPED = "failed", "stopped"  # how a text may end beyond the decoder's own reasons
_SMOOTH = 0.9  # what the mean duration of a request keeps of itself with each new one


class Full(Exception):
    """No place in the line; `wait`: seconds after which there may be one, estimated."""

    def __init__(self, wait: int):
        super().__init__(wait)
        self.wait = wait


class Worker:
    """Takes requests from any thread. Their `deliver` is called in the worker's.

    Every request that was taken hears how it ended exactly once, unless it was cancelled.
    """

    def __init__(self, decoder: Decoder, slots: int, queue: int, failed: Callable[[], None]):
        """
        Args:
          decoder: nobody else may use it from now on.
          slots: how many it has.
          queue: most requests that wait for a slot.
          failed: called in the worker's thread when decoding raised an error; nothing is taken after that.
        """
        self._decoder, self._slots, self._most, self._failed = decoder, slots, slots + queue, failed
        self._changed = threading.Condition()
        self._inbox: list[Request] = []
        self._open: dict[Request, float] = {}  # to when it came
        self._ending: str | None = None  # why nothing is taken any more
        self._seconds = 1.0  # that a request takes, on the mean
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._ending is None

    def submit(self, request: Request) -> None:
        """Puts a request into the line; Full where it is too long already."""
        with self._changed:
            if self._ending:
                request.deliver("", self._ending)
                return
            if len(self._open) >= self._most:
                waiting = len(self._open) - self._slots + 1
                raise Full(max(1, round(self._seconds * waiting / self._slots)))
            deliver = request.deliver

            def noted(text: str, reason: str | None) -> None:
                if reason:
                    self._forget(request)
                deliver(text, reason)

            request.deliver = noted
            self._open[request] = time.monotonic()
            self._inbox.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Nobody wants the rest: the request's slot or place in the line is free again. Also for one that has ended."""
        request.cancelled = True
        with self._changed:
            self._open.pop(request, None)

    def close(self) -> None:
        """Ends the thread after the step at hand; requests that are still open end as STOPPED."""
        with self._changed:
            self._ending = self._ending or STOPPED
            self._changed.notify()
        self._thread.join()

    def _forget(self, request: Request) -> None:
        with self._changed:
            came = self._open.pop(request, None)
            if came is not None:
                self._seconds = _SMOOTH * self._seconds + (1 - _SMOOTH) * (time.monotonic() - came)

    def _run(self) -> None:
        try:
            while self._take():
                self._decoder.advance()
        except Exception:
            traceback.print_exc()
            with self._changed:
                self._ending = FAILED
            self._failed()
        with self._changed:
            unheard = [request for request in self._open if not request.cancelled]
        for request in unheard:
            request.deliver("", self._ending)

    def _take(self) -> bool:
        """Hands new requests to the decoder, waiting for one if there is nothing to do; False to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or not self._decoder.idle or self._ending)
            new, self._inbox = self._inbox, []
            going_on = self._ending is None
        for request in new:
            self._decoder.submit(request)
        return going_on


def warm_up(decoder: Decoder) -> None:
    """Compiles the decoder's programs."""
    once = SamplingConfig(max_tokens=1, temperature=1.0, top_k=0, top_p=1.0, seed=0)
    decoder.submit(Request([decoder.model.tokenizer.eos_id], once, frozenset(), lambda text, reason: None))
    while not decoder.idle:
        decoder.advance()
