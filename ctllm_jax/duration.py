"""How long something lasts, in the unit that one thinks in: "600 steps", "1254.68e9 tokens", "3 epochs", "3%"."""

import dataclasses
import re

from ctllm_jax.common.errors import UserError

_FORM = re.compile(r"\s*(\d[\d_]*(?:\.\d*)?(?:[eE]\+?\d+)?)\s*(steps?|tokens?|epochs?|%)\s*")


@dataclasses.dataclass(frozen=True)
class Duration:
    """An amount of a unit: `steps` of the optimizer, `tokens`, `epochs`, or `%` of the run."""

    amount: float
    unit: str


def parse(text: str) -> Duration:
    """Reads a duration; ValueError where it is none."""
    found = _FORM.fullmatch(text)
    if not found:
        raise ValueError(
            f"{text!r} is not a duration: give a number of steps, tokens, epochs or %, such as '2000 steps'"
        )
    return Duration(float(found[1]), found[2] if found[2] == "%" else found[2].rstrip("s") + "s")


@dataclasses.dataclass(frozen=True)
class Clock:
    """What turns durations into steps.

    Attributes:
      tokens: positions that a step goes through, padding included.
      epoch: steps of one pass over the data, a fraction maybe; None where there is no such thing.
      run: steps of the whole run; None as long as that is what is asked for.
    """

    tokens: int
    epoch: float | None = None
    run: int | None = None

    def steps(self, text: str) -> int:
        """A duration in whole steps, the nearest number.

        Raises:
          UserError: epochs of data that have none, or a share of a run whose length is asked for.
        """
        duration = parse(text)
        if duration.unit == "epochs" and self.epoch is None:
            raise UserError(
                f"{text!r}: an epoch has no length here (sources drawn at data.rates end at different times, and a "
                "plan knows no store); give steps or tokens"
            )
        if duration.unit == "%" and self.run is None:
            raise UserError(f"the run cannot last {text!r} of itself; give steps, tokens or epochs")
        per_unit = {"steps": 1, "tokens": 1 / self.tokens, "epochs": self.epoch, "%": (self.run or 0) / 100}
        return round(duration.amount * per_unit[duration.unit])
