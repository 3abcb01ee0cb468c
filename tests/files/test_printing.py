import io
import logging
import sys

import pytest

from hpm_video.files.errors import ExpectedError
from hpm_video.files.printing import harmless, printable
from hpm_video.runs.console import run

HOSTILE = "a\x1b[2J\x9b1m\r\u202eb\udcff"
ESCAPED = "a\\x1b[2J\\x9b1m\\r\\u202eb\\udcff"


def test_what_controls_a_terminal_is_escaped_and_other_text_is_as_it_was():
    assert printable(HOSTILE) == ESCAPED
    text = "tabs\tand\nlines, Žluťoučký kůň, 走る, نمی\u200cخواهم, 👩\u200d🚀"
    assert printable(text) == text


def test_output_logs_and_errors_escape(capsys, monkeypatch):
    handler = logging.StreamHandler()

    def command():
        handler.setStream(sys.stdout)
        logging.getLogger("hpm_video").warning(HOSTILE)
        sys.stdout.write(f"{HOSTILE}\n")
        raise ExpectedError(HOSTILE)

    monkeypatch.setattr(logging.getLogger("hpm_video"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("hpm_video"), "propagate", False)
    assert run(command) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{ESCAPED}\n{ESCAPED}\n"
    assert captured.err == f"\nerror: {ESCAPED}\n"
    assert isinstance(sys.stdout, io.TextIOBase)


@pytest.mark.parametrize("cell", ["=1", "+1", "-1", "@a", " =1", "\t=1"])
def test_formulas_are_text(cell):
    assert harmless(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["a=1", "", -1, -0.5, None, "/v/-a.mp4"])
def test_numbers_and_other_text_stay(cell):
    assert harmless(cell) is cell
