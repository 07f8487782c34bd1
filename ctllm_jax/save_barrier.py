"""The barriers of a save by several processes: when one process cannot write its part, the others learn it at once.

Orbax has the processes wait for one another at barriers of JAX's coordination service, up to the whole time that a save
may take. A process whose part has failed skips the barriers around the commit and goes on to the one at the end of the
save, with its error on the way: that is how it is recognised here. (Should a later Orbax do it in another way, failures
are noticed when the time is up.)
"""

import collections
import sys
import threading
import time

import jax

from ctllm_jax import processes

_SKIPPED = ("async_write_complete", "async_commit_complete")  # in the keys of the barriers around the commit
_SHORTEST, _LONGEST = 0.01, 0.5  # seconds between two looks


class SaveBarrier:
    """A `barrier_sync_fn` of Orbax's AsyncOptions, for the saves of one manager up to the first that fails."""

    def __init__(self, name: str):
        """`name`: the same in all processes, another one for each manager."""
        self._client, self._prefix = processes.client(), f"ctllm/saves/{name}/"
        self._uses: collections.Counter[str] = collections.Counter()  # the same key comes again

    def absent(self) -> None:
        """Says that this process comes to no barrier of the save any more."""
        self._announce("absent")

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns when all processes have called it with this key.

        Raises:
          RuntimeError: another process failed, and does not come.
          TimeoutError: another process did not come in time.
        """
        in_background = threading.current_thread() is not threading.main_thread()
        if in_background and sys.exc_info()[1] is not None:
            self._announce("failed")
        # At the end of the save a failed process is there; before, it is waited for in vain.
        fatal = {"absent", "failed"} if any(name in key for name in _SKIPPED) else {"absent"}
        self._uses[key] += 1
        arrived, departed = (f"{self._prefix}{key}/{self._uses[key]}/{what}" for what in ("here", "left"))
        until, pause = time.monotonic() + timeout_ms / 1000, _SHORTEST
        self._client.key_value_increment(arrived, 1)
        while int(self._client.key_value_try_get(arrived)) < jax.process_count():
            if fatal & {name.rpartition("/")[2] for name, _ in self._client.key_value_dir_get(f"{self._prefix}news/")}:
                raise RuntimeError("another process could not write its part, and says why")
            if time.monotonic() > until:
                raise TimeoutError(f"not all processes came to {key} within {timeout_ms / 1000:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        if self._client.key_value_increment(departed, 1) == jax.process_count():
            self._client.key_value_delete(arrived)
            self._client.key_value_delete(departed)

    def _announce(self, state: str) -> None:
        self._client.key_value_set(f"{self._prefix}news/{state}", "", allow_overwrite=True)
