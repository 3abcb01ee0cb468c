"""Words in messages."""


def plural(count: int, noun: str) -> str:
    """Return a noun in the form that follows a number: "class", "classes", "epochs", "batches"."""
    return noun if count == 1 else noun + ("es" if noun.endswith(("s", "x", "tch", "sh")) else "s")


def counted(count: int, noun: str) -> str:
    """Return a number and its noun: "1 class", "2 classes"."""
    return f"{count} {plural(count, noun)}"
