"""How often a job may ask to be started again (status 75): as often as it is preempted, but not for ever at once."""

SHORT = 60.0  # seconds: a life that hardly any preemption ends so soon
MOST = 20  # such lives in a row
LONGEST_PAUSE = 60.0  # seconds before a start, at most; it doubles from one short life to the next


class Resumes:
    """Counts the short lives in a row; a longer one starts the count anew.

    Attributes:
      row: how many there are now.
    """

    def __init__(self):
        self.row = 0

    def count(self, life: float) -> None:
        """Takes in how long [seconds] the processes of an attempt ran that ended with EXIT_RESUME."""
        self.row = self.row + 1 if life < SHORT else 0

    @property
    def why(self) -> str:
        """Why the job is not started again; empty while it may be."""
        return given_up() if self.row >= MOST else ""


def given_up() -> str:
    """What the user is told of a job that is given up."""
    return (
        f"given up: {MOST} times in a row the processes asked within {SHORT:g} s to be started again (status 75); "
        "what they print before says who stops them"
    )
