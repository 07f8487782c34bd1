"""The one exception type whose message is written for the user, and what is told of others."""


class UserError(Exception):
    """Something the user can mend: what was wrong, where, what to do. The CLI prints it without a traceback."""


class Unanswered(UserError):
    """Nothing that the user has to mend: a storage does not answer, or another process failed. It may pass, so the
    program ends with a status after which the launcher starts it again."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its type's name where it says nothing."""
    text = str(error).partition("\n")[0] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
