import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.views import VIEWS, mask_of_view, standardise_by_view

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


def test_scores_of_seen_and_hidden_tokens_get_one_scale():
    mask = mask_of_view("quarter", VIDEO, "cpu")
    true = torch.randn(3, VIDEO.num_tokens, generator=torch.Generator().manual_seed(0))
    found = standardise_by_view(torch.where(mask.masked, true, 7 + 0.1 * true), mask)
    torch.testing.assert_close(found, standardise_by_view(true, mask), rtol=1e-3, atol=1e-4)
    picked = found.topk(392, dim=1).indices
    assert mask.masked[0, picked].float().mean() == pytest.approx(0.75, abs=0.04)
    for part in (found[~mask.masked.expand(3, -1)], found[mask.masked.expand(3, -1)]):
        of_clip = part.view(3, -1)
        torch.testing.assert_close(of_clip.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-5)
        torch.testing.assert_close(of_clip.std(dim=1, correction=0), torch.ones(3))


@pytest.mark.parametrize("scores", [torch.rand(2, 12), torch.ones(2, 12)])
def test_one_scale_where_all_tokens_are_seen_or_all_scores_are_equal(scores):
    mask = mask_of_view("every_fourth_step", TokenGrid(1, 3, 4), "cpu")
    found = standardise_by_view(scores, mask)
    assert torch.equal(found.argsort(dim=1, stable=True), scores.argsort(dim=1, stable=True))
