"""Replies to many requests: several at once, asked again with growing pauses, within a budget, each kept as it comes.

A reply is a file of its own, named after what was asked and written whole, so a kill loses none that is on the disk and
none of those is paid for again. Nothing is interpreted here.
"""

import concurrent.futures
import dataclasses
import pathlib
import random
import threading
import time
from collections.abc import Mapping, Sequence

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import read_json, write_json
from ctllm_jax.common.progress import Progress
from ctllm_jax.evaluate.judged.client import Again, Endpoint, Refused


@dataclasses.dataclass(frozen=True)
class CallConfig:
    """How endpoints are asked; decides no result."""

    at_once: int  # [requests] most requests under way
    timeout_seconds: float  # [s] of a request
    attempts: int  # [attempts] of a request, before it is left for the next run of the command
    first_wait_seconds: float  # [s] before the second attempt; doubles with each
    longest_wait_seconds: float  # [s] between attempts; an endpoint that asks for more ends the run
    keep_refused: bool  # count requests that an endpoint refuses as without a mark, instead of ending in an error

    def __post_init__(self):
        if self.at_once < 1 or self.attempts < 1 or self.timeout_seconds <= 0:
            raise ValueError("at_once and attempts are at least 1, timeout_seconds above 0")


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """What may be spent on one folder; None is no bound. Earlier runs' attempts in vain are not known."""

    requests: int | None  # [requests] each attempt is one
    tokens: int | None  # [tokens] prompts and judgements, as the endpoint counts; where it does not, at most so many


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """A request: to whom, what, and the name of its reply."""

    key: str
    judge: str
    messages: list[dict]


class _Stopped(Exception):
    """The run ends: nothing more is sent."""


class Collector:
    """Fills a folder with replies.

    Invariant: `_tokens` is what was spent and what the requests under way may at most spend, so no run goes beyond its
    budget.
    """

    def __init__(
        self, endpoints: Mapping[str, Endpoint], folder: pathlib.Path, calls: CallConfig, budget: BudgetConfig
    ):
        self._endpoints, self._folder, self._calls, self._budget = endpoints, folder, calls, budget
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._trouble: str | None = None  # why it stopped
        self._not_before = dict.fromkeys(endpoints, 0.0)  # an endpoint that asks for a pause gets it from all threads
        self._left: list[str] = []  # why requests were given up
        self._refused: list[str] = []
        kept = [read_json(path) for path in folder.glob("*.json")]
        self._requests = sum(reply["attempts"] for reply in kept)
        self._tokens = sum(reply["tokens"] for reply in kept)

    def path(self, request: JudgeRequest) -> pathlib.Path:
        """Where its reply is, or will be."""
        return self._folder / f"{request.key}.json"

    def run(self, requests: Sequence[JudgeRequest]) -> None:
        """Gets the replies that are not there yet.

        Raises:
          UserError: some could not be got; what was is kept, and the message says how to go on.
        """
        wanted = {
            request.key: request for request in requests
        }  # the same question about the same answers is asked once
        missing = [request for request in wanted.values() if not self.path(request).exists()]
        done = len(wanted) - len(missing)
        with Progress("judge", len(wanted), "judgements") as progress:
            progress.at(done)
            pool = concurrent.futures.ThreadPoolExecutor(self._calls.at_once)
            try:
                for future in concurrent.futures.as_completed([pool.submit(self._get, request) for request in missing]):
                    done += future.result()
                    progress.at(done)
            finally:  # also when interrupted: what is under way is waited for and kept, for it is paid
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        if done < len(wanted):
            reasons = [self._trouble] if self._trouble else self._left[:1] or self._refused[:1]
            hint = ""
            if self._refused:
                hint = f"; {len(self._refused)} were refused, which config.calls.keep_refused=True would count as such"
            raise UserError(
                f"{len(wanted) - done} of {len(wanted)} judgements are missing: {reasons[0]}{hint}. "
                "What came is kept; the same command goes on"
            )

    def _get(self, request: JudgeRequest) -> bool:
        """Asks until there is a reply; whether there is one."""
        for attempt in range(1, self._calls.attempts + 1):
            try:
                self._pause(request)
                estimate = self._take(request)
            except _Stopped:
                return False
            spent = 0
            try:
                reply = self._endpoints[request.judge].ask(request.messages, self._calls.timeout_seconds)
                counts = (reply["prompt_tokens"], reply["completion_tokens"])
                spent = estimate if None in counts else sum(counts)
                self._keep(request, attempt, spent, reply)
                return True
            except Refused as refusal:
                with self._lock:
                    self._refused.append(str(refusal))
                if self._calls.keep_refused:
                    self._keep(request, attempt, 0, {"refused": str(refusal)})
                return self._calls.keep_refused
            except Again as error:
                self._postpone(request, attempt, error)
            except UserError as error:
                self._end(str(error))
                return False
            finally:
                with self._lock:
                    self._tokens += spent - estimate
        return False

    def _keep(self, request: JudgeRequest, attempt: int, tokens: int, reply: dict) -> None:
        write_json(self.path(request), {"judge": request.judge, "attempts": attempt, "tokens": tokens, **reply})

    def _pause(self, request: JudgeRequest) -> None:
        """Waits until the judge may be asked again."""
        while (wait := self._not_before[request.judge] - time.monotonic()) > 0:
            if self._stop.wait(wait):
                break
        if self._stop.is_set():
            raise _Stopped

    def _take(self, request: JudgeRequest) -> int:
        """Sets aside a request and the most tokens that it may cost: one a byte, and the longest judgement."""
        estimate = sum(len(message["content"].encode("utf-8", "replace")) for message in request.messages)
        estimate += self._endpoints[request.judge].judge.max_tokens
        with self._lock:
            for name, spent, more in (("requests", self._requests, 1), ("tokens", self._tokens, estimate)):
                most = getattr(self._budget, name)
                if most is not None and spent + more > most:
                    self._end(f"one more would go beyond config.budget.{name} ({spent:,} of {most:,} are spent)")
                    raise _Stopped
            self._requests += 1
            self._tokens += estimate
        return estimate

    def _postpone(self, request: JudgeRequest, attempt: int, error: Again) -> None:
        """Before the next attempt, a pause: growing, of this thread; and what the endpoint asks for, of all."""
        calls, where = self._calls, f"judge {request.judge}: {error}"
        if attempt == calls.attempts:
            with self._lock:
                self._left.append(f"{where} (attempt {attempt})")
                down = len(self._left) >= calls.at_once
            if down:  # as many in vain as are under way at once: it is not this request
                self._end(self._left[-1])
            return
        if error.wait is not None:
            if error.wait > calls.longest_wait_seconds:
                self._end(f"{where}; it asks for a pause of {error.wait:,.0f} s")
            with self._lock:
                self._not_before[request.judge] = max(self._not_before[request.judge], time.monotonic() + error.wait)
        wait = min(calls.first_wait_seconds * 2 ** (attempt - 1), calls.longest_wait_seconds)
        self._stop.wait(wait * random.uniform(0.5, 1.0))  # not all at the same moment again

    def _end(self, trouble: str) -> None:
        self._trouble = self._trouble or trouble
        self._stop.set()
