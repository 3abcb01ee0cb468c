"""The report of a run: an HTML file that needs no other file."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_any_config, save_config
from hpm_video.runs.report import write_report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Texts, tables and pictures of a page; checks that all elements are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.cells, self.titles, self.shown = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.sources += [found[key] for key in ("src", "href") if key in found]
        self.shown += [found["alt"]] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.cells.append(data)
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a <run>"
    (folder / "pictures").mkdir(parents=True)
    save_config(load_any_config(Path("pretrain/demo")), folder / "config.yaml")
    return folder


def test_a_report_has_what_the_run_left_and_loads_nothing(run):
    common = {"kind": "validation", "student_ranking_by_motion": 0.57, "teacher_ranking": 0.6}
    lines = [
        {**common, "update": 0, "epoch": 0.0, "student_ranking": 0.5},
        {"kind": "train", "update": 20, "epoch": 1.0, "loss": 1.0, "clips_per_second": 8.0},
        {**common, "update": 20, "epoch": 1.0, "student_ranking": 0.66},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    start = {"first_update": 0, "time": "noon", "command": "train <x>", "device": "cpu"}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (run / "bad_files.csv").write_text("path,reason\n<b>.mp4,no frames\n")
    for path in ("curves", *(f"pictures/update-{n:08d}" for n in range(20))):
        Image.new("RGB", (4, 4)).save(run / f"{path}.png")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert len(page.sources) == 9
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    cells = "|".join(page.cells)
    assert "student_ranking|0.5|0.66|0.57" in cells
    assert "teacher_ranking|0.6|0.6|0.5" in cells
    assert "updates|20|training clips|160|hours of the updates|0.00556" in cells
    assert "<b>.mp4|no frames" in cells
    assert "time|noon|command|train <x>|device|cpu" in cells
    shown = [name for name in page.shown if name.startswith("pictures/update-")]
    ends = ("pictures/update-00000019", "pictures/update-00000000")
    assert (len(shown), shown[0], shown[-1]) == (8, *ends)


def test_a_report_of_a_run_that_has_just_begun(run, call_tool):
    code, output = call_tool("report", run)
    assert code == 0
    assert f"wrote {run / 'report.html'}" in output
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.sources == []
    assert page.titles == ["Config"]


def test_files_that_were_cut_off_and_odd_names_do_not_end_a_run(run):
    (run / "starts.jsonl").write_text('{"first_update": 0, "time": "noon", "command": "x"}\n{"fi')
    for name, text in {"cut": '{"top1"', "whole": '{"top1": 0.5}'}.items():
        (run / "test" / name).mkdir(parents=True)
        (run / "test" / name / "result.json").write_text(text)
    (run / "bad_files.csv").write_bytes(b"path,reason\n\xff.mp4,no frames\n")
    cells = "|".join(Page(write_report(run).read_text(encoding="utf-8")).cells)
    assert "whole|top1 0.5" in cells
    assert "cut" not in cells
    assert "time|noon|command|x" in cells
    assert r"\udcff.mp4|no frames" in cells


@pytest.mark.parametrize(
    "line",
    ['{"update": 3}', '{"update": 3, "kind": "probe", "x": null}'],
)
def test_a_line_that_is_not_of_metrics_is_named(run, line, call_tool):
    (run / "metrics.jsonl").write_text(f"{line}\n")
    code, output = call_tool("report", run)
    assert code == 2
    assert "line 1 is" in output


def test_what_is_no_run_has_no_report(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file"):
        write_report(tmp_path)


@pytest.mark.slow
def test_a_classifier_has_its_tests_and_its_confusion_matrix(finetuned_run):
    text = (finetuned_run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "Confusion matrix" in page.titles
    assert page.cells[page.cells.index("top1") + 3] == "0.333"
    assert len(page.sources) == 2
