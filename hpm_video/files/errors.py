"""Errors that the user of a program can correct, and text that people write."""

import codecs
from pathlib import Path

_MARKS_OF_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class ExpectedError(Exception):
    """What is wrong with an input or the machine. The message has value, rule and remedy.

    A program prints the message alone, and no traceback.
    """


def read_text(path: Path, wrong: type[ExpectedError], hint: str = "save it as UTF-8") -> str:
    """Read text in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises ``wrong`` if there is no such file, or it is not such text; ``hint`` is the remedy.
    """
    if path.exists() and not path.is_file():  # to read a device or a pipe may take for ever
        raise wrong(f"{path} is no file, but a folder, a pipe or a device; give a file of text")
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in _MARKS_OF_UTF_16 else "utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise wrong(
            f"{path} is not text in UTF-8: byte {error.start} is {byte:#04x}; {hint}"
        ) from error
    except OSError as error:
        raise wrong(f"{path} cannot be read: {error.strerror}") from error
