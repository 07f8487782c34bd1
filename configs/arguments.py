"""The argument of a config file: what stands behind its name and a colon."""


def checked(argument: str, known: tuple[str, ...] | dict[str, object]) -> str:
    """The argument; ValueError naming the known ones if it is none of them."""
    if argument not in known:
        raise ValueError(f"config argument {argument!r} is unknown; there are: {', '.join(filter(None, known))}")
    return argument
