"""Secrets in what processes print: each is replaced by its name, as `<NAME>`."""

import os
import re
from collections.abc import Mapping

_SHORTEST = 6  # characters; what is shorter stands in many a line by chance


class Hider:
    """Replaces the values of secrets, and of one that has several lines each line that is long enough."""

    def __init__(self, secrets: Mapping[str, str]):
        found = {os.fsencode(piece): f"<{name}>".encode() for name, value in secrets.items() for piece in pieces(value)}
        self._found = sorted(found.items(), key=lambda entry: -len(entry[0]))  # the whole before its parts

    def __call__(self, line: bytes) -> bytes:
        """A line without the secrets."""
        for value, name in self._found:
            line = line.replace(value, name)
        return line


def pieces(value: str) -> list[str]:
    r"""What is to be hidden of a value: all of it, and its lines, also such as JSON writes them: one\ntwo.

    Empty where nothing of it is long enough.
    """
    lines = re.split(r"[\r\n]+", value)  # a printed line holds no line end
    parts = [part for line in lines for part in (line, *re.split(r"\\r|\\n", line))]
    return [part for part in dict.fromkeys(part.strip() for part in parts) if len(part) >= _SHORTEST]
