"""Exit statuses of `ctllm` that other programs act on: schedulers, `ctllm launch`."""

from ctllm_jax.common.errors import Unanswered, UserError

EXIT_MISTAKE = 2  # the user's to mend: starting again changes nothing
EXIT_LOST = 69  # another process of the job or the storage is gone, or nothing moves: start all of them again
EXIT_RESUME = 75  # stopped on request after saving: start the same command again


def status_of(error: BaseException) -> int:
    """What a program ends with that ends by an error."""
    kinds = {Unanswered: EXIT_LOST, UserError: EXIT_MISTAKE, KeyboardInterrupt: 130}  # the first that it is
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), 1)
