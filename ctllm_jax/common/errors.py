"""The one exception type whose message is written for the user."""


class UserError(Exception):
    """Something the user can mend: what was wrong, where, what to do. The CLI prints it without a traceback."""
