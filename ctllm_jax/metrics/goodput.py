"""Where a job's wall time goes, from its first start on, over all its processes: goodput and its complement.

Everything is in the job lines of metrics.jsonl. They hold the accounts so far; a process that takes the run up goes
on from those that it finds, and knows from the step at which it does so which work was lost.
"""

import time
from collections.abc import Mapping, Sequence

WORK = ("steps", "evaluation", "checkpoint", "profile")  # what is lost when a process goes on from before it
ACCOUNTS = ("steps", "start", *WORK[1:], "lost", "down")
_SIGN = 60.0  # seconds after which a job line is due


class Timesheet:
    """Seconds by account. A process is always at exactly one thing; it begins with its start.

    Attributes:
      seconds: {account: seconds so far}, up to the last `entry` or `switch`.
      doing: the account that time is spent on.
      starts: processes that have worked on the run, this one included.
    """

    def __init__(self, seconds: Mapping[str, float], starts: int, started: float):
        """`started`: when this process opened the run's folder, in seconds since 1970."""
        self.seconds = {name: float(seconds.get(name, 0.0)) for name in ACCOUNTS}
        self.starts = starts
        self.doing = "start"
        self._since = time.monotonic() - max(time.time() - started, 0.0)
        self._line_at = time.monotonic()

    def switch(self, doing: str) -> float:
        """From now on time is spent on this account; returns what the one before has had since the last switch."""
        spent = self._settle()
        self.doing = doing
        return spent

    def due(self) -> bool:
        """Whether it is time for a line, as a sign of life."""
        return time.monotonic() - self._line_at >= _SIGN

    def entry(self) -> dict[str, float]:
        """What a job line says."""
        self._settle()
        self._line_at = self._since
        total = sum(self.seconds.values())
        accounts = {f"seconds/{name}": round(value, 3) for name, value in self.seconds.items()}
        return {"starts": self.starts, "goodput": self.seconds["steps"] / total if total else 0.0, **accounts}

    def _settle(self) -> float:
        now = time.monotonic()
        spent, self._since = now - self._since, now
        self.seconds[self.doing] += spent
        return spent


def take_up(entries: Sequence[Mapping], resume_step: int, started: float) -> Timesheet:
    """The timesheet of a process that goes on from a step, in the light of all that was logged before it.

    Args:
      entries: lines of metrics.jsonl, those of steps after `resume_step` too.
      resume_step: the step of the checkpoint that was restored, 0 where there was none.
      started: when this process opened the folder, in seconds since 1970.
    """
    lines = [entry for entry in entries if entry["kind"] == "job"]
    if not lines:
        return Timesheet({}, 1, started)
    last, end = lines[-1], entries[-1]["time"]
    kept = next((line for line in reversed(lines) if line["step"] <= resume_step), {})
    seconds = {name: last.get(f"seconds/{name}", 0.0) for name in ACCOUNTS}
    for name in WORK:
        seconds["lost"] += seconds[name] - kept.get(f"seconds/{name}", 0.0)
        seconds[name] = kept.get(f"seconds/{name}", 0.0)
    seconds["lost"] += max(end - last["time"], 0.0)
    seconds["down"] += max(started - end, 0.0)
    return Timesheet(seconds, last["starts"] + 1, started)
