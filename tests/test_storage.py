"""What a storage says when it cannot be read, and what then becomes of a program."""

import errno

import pytest

from ctllm_jax.common.status import status_of
from ctllm_jax.common.storage import unread

CURL = "PerformWork() - CURL error [7]=Couldn't connect to server"
READING = "; reading gs://b/store/a.array_record; at byte 0; Could not read from the underlying reader; at byte 0"


@pytest.mark.parametrize(
    ("text", "status"),
    [  # as ArrayRecord hands on what Google's C++ client says, and TensorStore
        (f"Retry policy exhausted, with a last message of {CURL}{READING}", 69),
        ("Retry policy exhausted in Read(): Received HTTP status code: 503", 69),
        ("Error in non-idempotent operation: Received HTTP status code: 429", 69),
        ("UNAVAILABLE: Error reading from gs://b/run/checkpoints/5", 69),
        ("DEADLINE_EXCEEDED: no answer", 69),
        (f"Permanent error, with a last message of Received HTTP status code: 403{READING}", 2),
        (f"Permanent error, with a last message of a@b does not have storage.objects.get access{READING}", 2),
        ("PERMISSION_DENIED: Error reading from gs://b/run/checkpoints/5", 2),
        (f"Permanent error, with a last message of No such object: b/store/a.array_record{READING}", None),
        (f"Permanent error, with a last message of Received HTTP status code: 404{READING}", None),
        ("Invalid ArrayRecord/RiegeliFooter; reading a.array_record", None),
        ("row 4503 of 5030 is cut short", None),
    ],
)
def test_what_a_storage_says_is_told_from_damage(text, status):
    found = unread("here", RuntimeError(text), "in a line")
    assert (found and status_of(found)) == status
    assert not found or str(found).startswith("here cannot be read now (in a line); nothing was changed; ")


def test_errors_of_the_system_are_told_by_their_number_and_by_what_caused_them():
    try:
        raise ValueError("while reading") from OSError(errno.EIO, "Input/output error")
    except ValueError as error:
        assert status_of(unread("here", error, "")) == 69
    assert status_of(unread("here", PermissionError(errno.EACCES, "Permission denied"), "")) == 2
    assert unread("here", FileNotFoundError(errno.ENOENT, "No such file"), "") is None
