"""`ctllm` as a test calls it: in this process, with what it printed."""

from ctllm_jax import cli


def ctllm(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a command."""
    capsys.readouterr()
    status = 0
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        status = end.code
    return (status, *capsys.readouterr())
