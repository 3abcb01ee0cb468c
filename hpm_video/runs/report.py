"""The report of a run: one HTML file that needs no other."""

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from hpm_video.config.loading import config_text, load_any_config
from hpm_video.files.atomic import written_beside
from hpm_video.files.failures import BadFiles
from hpm_video.files.wording import counted
from hpm_video.recognition.labels import read_label_names
from hpm_video.training.summary import Rows, cost_of, lines_of, measures_of, starts_of, tests_of

MOST_SHEETS = 8
"""Sheets of pictures of each source that are shown, spread over the run."""
MOST_FILES = 20
"""Bad files that are listed of each source."""
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table, pre { display: block; overflow-x: auto; border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; }
th { font-weight: normal; opacity: .7; }
tr { border-bottom: 1px solid #8885; }
img { max-width: 100%; }
</style>
</head>
<body>
<h1>$title</h1>
$sections
</body>
</html>
""")


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the directory of a run, finished or not. -> its path

    Raises:
        ConfigError, MetricsError: the directory is none of a run, or a file in it cannot be read.
    """
    config, lines, starts = load_any_config(run / "config.yaml"), lines_of(run), starts_of(run)
    listed = run / "labels.txt"
    names = read_label_names(listed) if listed.is_file() else ()
    facts: Rows = [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in (starts or [{}])[-1].items()
    ]
    heads = ("measure", "at the start", "now", "baseline")
    sections = {
        "Measures": _table(measures_of(lines, len(names)), *heads)
        + _table(tests_of(run), "test", "result"),
        "Curves": _images([run / "curves.png"]),
        "Confusion matrix": _images(sorted(run.glob("test/*/confusion.png"))),
        "What is hidden and reconstructed": _sheets(run / "pictures"),
        "Bad files": _bad_files(run),
        "Cost": _table(cost_of(lines, config.recipe.batch_size * config.data.repeats)),
        "Environment of the last start": _table(facts),
        "Config": f"<pre>{escape(config_text(config))}</pre>",
    }
    page = PAGE.substitute(
        title=escape(run.resolve().name),
        sections="\n".join(f"<h2>{title}</h2>\n{text}" for title, text in sections.items() if text),
    )
    path = run / "report.html"
    with written_beside(path) as file:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")  # of names of files
    return path


def _table(rows: Rows, *heads: str) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "\n".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(each)}</td>' for each in others)}</tr>"
        for first, *others in rows
    )
    return f"<table>{head and f'<tr>{head}</tr>'}\n{body}</table>\n"


def _images(paths: Iterable[Path]) -> str:
    """Show the pictures that there are, each below its name."""
    shown = ""
    for path in paths:
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            name = escape(f"{path.parent.name}/{path.stem}")
            shown += f'<p>{name}<br><img alt="{name}" src="data:image/png;base64,{data}"></p>\n'
    return shown


def _sheets(folder: Path) -> str:
    """Show sheets of each source, the newest first."""
    shown = ""
    for place in sorted({path.parent for path in folder.rglob("update-*.png")}):
        sheets = sorted(place.glob("update-*.png"), reverse=True)
        chosen = np.linspace(0, len(sheets) - 1, min(len(sheets), MOST_SHEETS)).round().astype(int)
        shown += _images(sheets[number] for number in chosen)
    return shown


def _bad_files(run: Path) -> str:
    shown = ""
    for path in sorted(run.glob("bad_files*.csv")):
        listed = BadFiles(path, num_files=0, max_bad_share=1, writes=False)
        failures = [*listed.failures.values()]
        rows: Rows = [(each.path, each.reason) for each in failures[:MOST_FILES]]
        shown += f"<p>{counted(len(failures), 'file')} did not decode ({escape(path.name)}):</p>"
        shown += _table(rows, "file", "reason")
    return shown
