"""Inputs that cannot be read to their end, and when one that is packed is taken for a bomb."""

EXPANSION, JUDGED = 200, 1 << 27  # times its size that a file may expand to, once it has so many bytes


class Damaged(Exception):
    """The rest of an input cannot be read; the text says why."""


def refuse_bomb(given: int, taken: int) -> None:
    """Raises Damaged when `given` bytes are more than `taken` packed ones can honestly hold."""
    if given > max(JUDGED, EXPANSION * taken):
        raise Damaged(f"a decompression bomb: more than {EXPANSION} times its size")
