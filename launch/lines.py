"""Output of processes, line by line, as bytes: nothing is decoded, so nothing can be undecodable."""

_REDRAW = 10.0  # seconds between two looks at a line that is redrawn in place
_LONGEST = 1 << 20  # bytes after which a line is cut


class Lines:
    """Cuts a stream into lines. Of a line that is redrawn after a carriage return, what it last looked like counts.

    Attributes:
      last: the last line that was not blank.
    """

    def __init__(self):
        self.last = b""
        self._rest, self._shown = b"", float("-inf")

    def feed(self, data: bytes, now: float) -> list[bytes]:
        """The lines that these bytes complete, without line ends; `now` in seconds."""
        *whole, rest = (self._rest + data).split(b"\n")
        lines = [_face(line) for line in whole]
        drawn, redrawn, self._rest = rest.rpartition(b"\r")
        if redrawn and _face(drawn) and self._rest:
            if now - self._shown >= _REDRAW:
                lines.append(_face(drawn))
                self._shown = now
        else:
            self._rest = rest
        if len(self._rest) > _LONGEST:
            lines.append(_face(self._rest))
            self._rest = b""
        return self._remember(lines)

    def end(self) -> list[bytes]:
        """What stands there without a line end, when the stream has ended."""
        line, self._rest = _face(self._rest), b""
        return self._remember([line] if line else [])

    def _remember(self, lines: list[bytes]) -> list[bytes]:
        self.last = next((line for line in reversed(lines) if line.strip()), self.last)
        return lines


def _face(line: bytes) -> bytes:
    """How a line looks in the end: what follows its last carriage return, but for one at its end."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]
