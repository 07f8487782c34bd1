"""What a storage says that cannot be read now, told from what is wrong with what is stored."""

import errno
import re

from ctllm_jax.common.errors import Unanswered, UserError

_CLIENTS = ("aiohttp", "gcsfs", "google", "requests", "urllib3")  # libraries that go to gs://, with errors of their own
# As TensorStore, ArrayRecord and the clients below them put it; the last two are Google's C++ client's, whose permanent
# errors are all answers but success that it does not ask again for.
_REFUSED = re.compile(
    r"PERMISSION_DENIED|UNAUTHENTICATED|^Forbidden|HTTP status code: 40[13]\b"
    r"|Permanent error\b(?!.*(\b404\b|No such object|Not Found))",
    re.DOTALL,
)
_SILENT = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|HTTP status code: (408|429|5\d\d)\b"
    r"|Retry policy exhausted|retry-policy-exhausted"
)


def unread(place: object, error: BaseException, said: str) -> UserError | None:
    """What to raise where something cannot be read now; None where the error is about what is stored.

    Unanswered where the storage does not answer, which may pass; UserError where it refuses, which is to be mended.

    Args:
      place: what was to be read.
      error: what was met, with what caused it.
      said: the same in a line.
    """
    links = [error]
    while links[-1].__cause__ is not None:
        links.append(links[-1].__cause__)
    texts = [str(link) for link in links]
    what = f"{place} cannot be read now ({said}); nothing was changed"
    refused = any(isinstance(link, OSError) and link.errno in (errno.EACCES, errno.EPERM) for link in links)
    if refused or any(map(_REFUSED.search, texts)):
        return UserError(f"{what}; this account needs the right to read it")
    if any(map(is_storage, links)) or any(map(_SILENT.search, texts)):
        return Unanswered(f"{what}; the same command goes on once it can be read")
    return None


def is_storage(error: BaseException) -> bool:
    """Whether an error is the system's or a client's, and not of a file that is missing."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, NotADirectoryError)))
        or type(error).__module__.partition(".")[0] in _CLIENTS
    )
