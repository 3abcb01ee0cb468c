import io
import logging
import sys

import pytest

from hpm_video.files.errors import ExpectedError
from hpm_video.files.printing import harmless, printable
from hpm_video.runs.console import run
from hpm_video.workers.progress_bar import ProgressBar

HOSTILE = "a\x1b[2J\x9b1m\r\u202eb\udcff"
ESCAPED = "a\\x1b[2J\\x9b1m\\r\\u202eb\\udcff"


def test_what_controls_a_terminal_is_escaped_and_other_text_stays():
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


def test_streams_that_were_closed_before_the_start_take_everything(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as Python sets them after >&-
    monkeypatch.setattr(logging.getLogger("hpm_video"), "propagate", False)

    def command():
        sys.stdout.write("nobody\n")
        ProgressBar(2, "things").advance()
        raise ExpectedError("nobody")

    assert run(command) == 2
    for name in ("stdout", "stderr"):
        getattr(sys, name).close()


@pytest.mark.parametrize("cell", ["=1", "+1", "-1", "@a", " =1", "\t=1"])
def test_formulas_are_text(cell):
    assert harmless(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["a=1", "", -1, -0.5, None, "/v/-a.mp4"])
def test_numbers_and_other_text_stay(cell):
    assert harmless(cell) is cell
