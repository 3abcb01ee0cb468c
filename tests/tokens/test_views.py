import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.views import VIEWS, mask_of_view

grids = st.builds(TokenGrid, *[st.integers(1, 9)] * 3)
PARTS = sorted(VIEWS.keys() - {"all"})
VIDEO = TokenGrid(8, 14, 14)


def seen(view, grid):
    """(T, H, W) bool"""
    return ~mask_of_view(view, grid, "cpu").masked.view(grid.time, grid.height, grid.width)


@given(grid=grids, view=st.sampled_from(PARTS))
def test_a_view_shows_some_tokens_of_any_clip_and_splits_all_of_them(grid, view):
    mask = mask_of_view(view, grid, "cpu")
    assert mask.visible_ids.shape[1] > 0
    assert not mask.masked[0, mask.visible_ids[0]].any()
    assert mask.masked[0, mask.masked_ids[0]].all()
    both = torch.cat([mask.visible_ids, mask.masked_ids], dim=1)
    assert both.sort().values.tolist() == [[*range(grid.num_tokens)]]


@pytest.mark.parametrize(
    ("view", "share"),
    [("checkerboard", 2), ("every_second_step", 2), ("quarter", 4), ("every_fourth_step", 4)],
)
def test_shares_of_a_video(view, share):
    assert seen(view, VIDEO).sum() * share == VIDEO.num_tokens


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbours_on_a_checkerboard_are_never_both_seen(axis):
    flags = seen("checkerboard", VIDEO)
    assert torch.equal(flags.narrow(axis, 1, 7), ~flags.narrow(axis, 0, 7))


def test_a_quarter_is_spread_over_rows_and_columns_and_shifts_in_time():
    flags = seen("quarter", VIDEO)
    assert (flags.sum(dim=(1, 2)) == 49).all()
    assert flags[:4].sum(dim=0).eq(1).all(), "each position is seen in one of four time steps"


def test_steps_are_seen_whole_or_not_at_all_and_a_single_one_is():
    for view, steps in ("every_second_step", [0, 2, 4, 6]), ("every_fourth_step", [1, 5]):
        flags = seen(view, VIDEO)
        assert flags.all(dim=2).all(dim=1).nonzero().flatten().tolist() == steps
        assert flags.sum() == len(steps) * 196
        assert seen(view, TokenGrid(1, 3, 4)).all()


def test_all_tokens_need_no_mask():
    assert mask_of_view("all", VIDEO, "cpu") is None
