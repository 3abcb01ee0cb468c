"""The tables of docs/scaling.md are what the tool derives."""

import os
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"

LARGE = pytest.mark.skipif(
    os.environ.get("HPM_EVERY_SIZE") != "1",
    reason="the same code as for ViT-B, and over a minute; HPM_EVERY_SIZE=1 runs it",
)


def table_of(name):
    found = re.search(f"<!-- scaling {name} -->\n(.*?)\n<!-- end of {name} -->", text(), re.DOTALL)
    return found[1]


def text():
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("size", ["b", *(pytest.param(size, marks=LARGE) for size in "lh")])
def test_tables_of_the_page_are_what_the_tool_derives(run_tool, tmp_path, size):
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"(<!-- scaling \w+ -->\n).*?(<!-- end)", r"\1\2", text(), flags=re.S))
    config = f"configs/pretrain/k400_hpm_{size}.yaml"
    code, output = run_tool("count_flops", "--scaling", config, "--write", page)
    assert code == 0, output
    for name in ("state", f"k400_hpm_{size}"):
        assert f"<!-- scaling {name} -->\n{table_of(name)}\n<!-- end" in page.read_text()


def test_a_page_without_markers_is_refused(run_tool, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    code, output = run_tool("count_flops", "--scaling", "--write", page)
    assert code == 2
    assert "<!-- scaling state -->" in output
    assert page.read_text() == "nothing\n"


@pytest.mark.parametrize(
    ("stage", "passes", "sent"),
    [("DDP", 4, 2), ("ZeRO 0", 4, 2), ("ZeRO 1", 4, 3), ("ZeRO 2", 4, 9), ("ZeRO 3", 4, 16)],
)
def test_what_is_sent_is_counted_by_hand_for_the_largest(stage, passes, sent):
    """ViT-H on 8 GPUs: 751620097 parameters of 4 bytes, of which each sends 7/8."""
    row = next(line for line in table_of("k400_hpm_h").splitlines() if f"| 8 | {stage} |" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == f"{passes} x 32"
    assert float(cells[10]) == pytest.approx(sent * 4 * 0.751620097 * 7 / 8, abs=0.05)


def test_costs_are_those_of_the_page():
    """Multiply-adds of a clip, by hand from shapes: student 154, teacher 197, to 2 %."""
    cost = re.search(r"(\d+) GMAC per clip for the student and (\d+)", table_of("k400_hpm_b"))
    assert [int(number) for number in cost.groups()] == pytest.approx([154, 197], rel=0.02)
