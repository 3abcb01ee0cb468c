"""Words of messages."""


def plural(count: int, noun: str) -> str:
    """Return a noun as it stands behind a number."""
    return noun if count == 1 else noun + ("es" if noun.endswith(("s", "x", "sh", "tch")) else "s")


def counted(count: int, noun: str) -> str:
    """Return a number and its noun: "1 class", "2 classes"."""
    return f"{count} {plural(count, noun)}"
