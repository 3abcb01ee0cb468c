"""The report of a run: one HTML file that needs no other."""

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

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
:root { color-scheme: light dark; --line: #d8d8de; --faint: #64646c; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; max-width: 48rem; }
th { color: var(--faint); font-weight: normal; white-space: nowrap; }
figure { margin: 0; overflow-x: auto; }
img { max-width: 100%; height: auto; }
figure img { max-width: max(100%, 44rem); }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .75rem; }
summary { cursor: pointer; padding: .25rem 0; }
.faint { color: var(--faint); }
@media (prefers-color-scheme: dark) {
  :root { --line: #3c3c44; --faint: #a0a0aa; }
  body { background: #17171a; color: #e6e6ea; }
  img.plot { filter: invert(.92) hue-rotate(180deg); }
}
</style>
</head>
<body>
<h1>$title</h1>
<p class="faint">$subtitle</p>
$sections
</body>
</html>
""")


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the directory of a run, finished or not. -> its path

    Raises:
        ConfigError, MetricsError: the directory is none of a run, or a file in it cannot be read.
    """
    config, lines = load_any_config(run / "config.yaml"), lines_of(run)
    listed = run / "labels.txt"
    names = read_label_names(listed) if listed.is_file() else ()
    facts = starts_of(run)
    repeats = config.data.repeats
    cost = cost_of(lines, config.recipe.batch_size * repeats)
    lists: Rows = [
        (f"{key}data.{of}", str(getattr(data, of)))
        for key, data in {f"mix.{n}." if n else "": d for n, d in config.sources.items()}.items()
        for of in ("train", "validation")
    ]
    sections = {
        "Measures": _table(
            measures_of(lines, len(names)), "measure", "at the start", "now", "baseline"
        )
        + _table(tests_of(run), "test", "result"),
        "Curves": _images([run / "curves.png"]),
        "Confusion matrix": _images(sorted(run.glob("test/*/confusion.png"))),
        "What is hidden and reconstructed": _sheets(run / "pictures"),
        "Data": _table(lists) + _findings(run),
        "Cost": _table(cost),
        "Environment": _table(
            [(name, _text(value)) for name, value in (facts or [{}])[-1].items()]
        ),
        "Starts": _table(
            [(f"{each['first_update']}", each["time"], each["command"]) for each in facts[-10:]],
            "at update",
            "time",
            "command",
        ),
        "Config": "<details><summary>every setting</summary>"
        f"<pre>{escape(config_text(config))}</pre></details>",
    }
    kind = "Fine-tuning" if names else "Pre-training"
    updates = f": {' '.join(cost[0])}" if cost else ""
    page = PAGE.substitute(
        title=escape(f"{run.resolve().name}"),
        subtitle=escape(f"{kind} with hpm_video{updates}"),
        sections="\n".join(
            f"<section><h2>{title}</h2>\n{text}</section>"
            for title, text in sections.items()
            if text
        ),
    )
    path = run / "report.html"
    with written_beside(path) as file:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")  # of names of files
    return path


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(rows: Rows, *heads: str) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "\n".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(each)}</td>' for each in others)}</tr>"
        for first, *others in rows
    )
    return f"<table>{head and f'<tr>{head}</tr>'}\n{body}</table>\n"


def _image(path: Path, kind: str = "plot") -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:image/png;base64,{data}"
    return f'<img class="{kind}" alt="{escape(path.stem)}" src="{source}">\n'


def _images(paths: Iterable[Path]) -> str:
    return "".join(f"<figure>{_image(path)}</figure>" for path in paths if path.is_file())


def _sheets(folder: Path) -> str:
    """Show the sheets of each source, the newest first and open."""
    shown = ""
    for place in sorted({path.parent for path in folder.rglob("update-*.png")}):
        sheets = _spread(sorted(place.glob("update-*.png")), MOST_SHEETS)[::-1]
        for number, path in enumerate(sheets):
            title = escape(path.relative_to(folder).with_suffix("").as_posix())
            opened = "" if number else " open"
            shown += f"<details{opened}><summary>{title}</summary>{_image(path, 'sheet')}</details>"
    return shown


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    """Choose at most so many, the first and the last among them."""
    if len(paths) <= most:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]


def _findings(run: Path) -> str:
    shown = ""
    for path in sorted(run.glob("bad_files*.csv")):
        listed = BadFiles(path, num_files=0, max_bad_share=1, writes=False)
        failures = [*listed.failures.values()]
        rows: Rows = [(each.path, each.reason) for each in failures[:MOST_FILES]]
        shown += f"<p>{counted(len(failures), 'file')} did not decode ({escape(path.name)}):</p>"
        shown += _table(rows, "file", "reason")
    return shown or "<p>No file of the training data failed to decode.</p>"
