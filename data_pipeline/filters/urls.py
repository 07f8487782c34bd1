"""Lists of unwanted web sites in UT1's format: FOLDER/CATEGORY/domains and FOLDER/CATEGORY/urls, an entry a line.

An entry is kept as a 64-bit hash: UT1's four and a half million take 40 MB. Hosts are compared without case.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import numpy as np
import xxhash

from ctllm_jax.common.errors import UserError

MATCHES = ("boundaries", "prefix")


@dataclasses.dataclass(frozen=True)
class UrlConfig:
    """folder: '' for no list; categories: of the folder (empty: all).

    match: 'boundaries': a host or any of its parent domains is in `domains`, or the address goes on from an entry of
    `urls` at a path boundary. 'prefix': the address begins with an entry of `urls`, character by character, `domains`
    are not read: as the released script does, where `bad.com/x` also blocks `bad.com/xylophone`.
    """

    folder: str
    categories: tuple[str, ...]
    match: str

    def __post_init__(self) -> None:
        if self.match not in MATCHES:
            raise UserError(f"filters.urls.match: {self.match!r} is not one of {', '.join(MATCHES)}")


@functools.cache
def load(config: UrlConfig) -> "UrlLists | None":
    """The lists, read once in a process; None without a folder."""
    return UrlLists(config) if config.folder else None


class UrlLists:
    """Answers whether an address is on a list.

    Raises:
      UserError: there is no such folder or category, or no list in any of them.
    """

    def __init__(self, config: UrlConfig):
        folder = pathlib.Path(config.folder)
        if not folder.is_dir():
            raise UserError(f"filters.urls.folder: there is no folder {config.folder}")
        self._prefix = config.match == "prefix"
        self._categories = config.categories or sorted(path.name for path in folder.iterdir() if path.is_dir())
        for category in self._categories:
            if not (folder / category).is_dir():
                raise UserError(f"filters.urls.categories: {config.folder} has no category {category!r}")
        files = ("urls",) if self._prefix else ("domains", "urls")
        self._lists = {
            name: _List([folder / category / name for category in self._categories], exact=self._prefix)
            for name in files
        }
        if not any(len(entries) for entries in self._lists.values()):
            raise UserError(f"filters.urls.folder: {config.folder} holds no {' or '.join(files)} file with entries")

    def find(self, url: str) -> str | None:
        """What lists the address, as 'category/file: entry'; None if nothing does."""
        for name, candidate in self._candidates(url):
            category = self._lists[name].category(candidate)
            if category is not None:
                return f"{self._categories[category]}/{name}: {candidate}"
        return None

    def _candidates(self, url: str) -> Iterator[tuple[str, str]]:
        """(list, entry) that would block the address."""
        address = url.strip().split("://", 1)[-1]
        if self._prefix:
            yield from (("urls", address[:n]) for n in self._lists["urls"].lengths if n <= len(address))
            return
        host, path = _split(address)
        yield from (("domains", host[begin:]) for begin in _parents(host, self._lists["domains"].longest))
        longest = self._lists["urls"].longest
        for name in dict.fromkeys((host, host.removeprefix("www."))):
            ends = [i for i, mark in enumerate(path[: max(0, longest + 1 - len(name))]) if mark in "/?#&;"]
            whole = [len(path)] if len(name) + len(path) <= longest else []
            yield from (("urls", name + path[:end]) for end in ends + whole)


def _parents(host: str, longest: int) -> list[int]:
    """Where the host and its parent domains begin that have at most so many characters, the longest first."""
    begins = [0] if len(host) <= longest else []
    return begins + [i + 1 for i in range(max(0, len(host) - longest - 1), len(host)) if host[i] == "."]


def _split(address: str) -> tuple[str, str]:
    """(host in lower case without user and port, path with what follows)."""
    end = next((i for i, character in enumerate(address) if character in "/?#"), len(address))
    host = address[:end].rsplit("@", 1)[-1].split(":", 1)[0].rstrip(".").lower()
    return host, address[end:]


class _List:
    """The entries of one file of every category. Addresses come from anybody: what is longer than all entries is not
    compared with them, so the lists bound what an address costs.

    lengths: those of the entries in characters, ascending; longest: the last of them.
    """

    def __init__(self, files: list[pathlib.Path], exact: bool):
        hashes, owners, lengths = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint16)], set()
        for number, path in enumerate(files):
            if not path.is_file():
                continue
            entries = [line.strip() for line in path.read_bytes().decode("utf-8", "replace").splitlines()]
            entries = [entry if exact else _normal(entry) for entry in entries if entry and not entry.startswith("#")]
            lengths.update(map(len, entries))
            hashes.append(np.array([_hash(entry) for entry in entries], np.uint64))
            owners.append(np.full(len(entries), number, np.uint16))
        all_hashes = np.concatenate(hashes)
        order = np.argsort(all_hashes, kind="stable")
        self._hashes, self._owners = all_hashes[order], np.concatenate(owners)[order]
        self.lengths = sorted(lengths)
        self.longest = max(lengths, default=0)

    def __len__(self) -> int:
        return len(self._hashes)

    def category(self, entry: str) -> int | None:
        """Number of the first category that lists the entry."""
        wanted = np.uint64(_hash(entry))
        place = np.searchsorted(self._hashes, wanted)
        return int(self._owners[place]) if place < len(self._hashes) and self._hashes[place] == wanted else None


def _normal(entry: str) -> str:
    return "".join(_split(entry.split("://", 1)[-1])).rstrip("/")


def _hash(entry: str) -> int:
    return xxhash.xxh3_64_intdigest(entry.encode("utf-8", "surrogatepass"))
