import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.randomness import uniform
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import (
    STRATEGIES,
    MaskRule,
    TokenMask,
    choose_masked,
    count_masked,
    tokens_to_units,
    units_to_tokens,
)

grids = st.builds(TokenGrid, *[st.integers(1, 4)] * 3)
IMAGE = TokenGrid.of_clip((1, 224, 224), (1, 16, 16))
VIDEO = TokenGrid.of_clip((16, 224, 224), (2, 16, 16))


@pytest.mark.parametrize(
    ("units", "ratio", "rule", "masked"),
    [
        (196, 0.75, "hpm", 147),
        (196, 0.75, "videomae", 147),
        (1568, 0.9, "hpm", 1412),
        (1568, 0.9, "videomae", 1411),
        (196, 0.9, "hpm", 177),
        (196, 0.9, "videomae", 176),
        (100, 0.7, "hpm", 70),  # 100 (1 - 0.7) is 30.000000000000004
        (10, 0.7, "hpm", 7),
        (10, 0.8, "hpm", 9),  # 10 (1 - 0.8) is 1.9999999999999996
        (10, 0.8, "videomae", 8),
    ],
)
def test_integer_rules(units, ratio, rule, masked):
    assert count_masked(units, ratio, rule) == masked


def test_a_mask_that_shows_nothing_is_refused():
    with pytest.raises(ValueError, match="hides 10 of 10"):
        count_masked(10, 0.9, "hpm")  # 10 (1 - 0.9) is 0.9999999999999998


def test_videomae_tubes_hide_176_positions_in_each_frame_slice():
    rule = MaskRule(VIDEO, "tube", count_masked(196, 0.9, "videomae"), STRATEGIES["random"])
    mask = rule.draw(None, torch.rand(2, rule.num_units), num_picked=0)
    assert mask.masked_ids.shape == (2, 1408)
    assert mask.visible_ids.shape == (2, 160)


@pytest.mark.parametrize(
    ("num_masked", "epochs", "first", "last"),
    [(147, 200, 2, 73), (147, 800, 10, 73), (147, 1600, 21, 73), (1412, 800, 1, 706)],
)
def test_first_guided_epoch_and_last_hard_count_of_the_official_code(
    num_masked, epochs, first, last
):
    rule = MaskRule(VIDEO, "token", num_masked, STRATEGIES["easy_to_hard"])
    counts = [rule.num_picked(epoch, epochs) for epoch in range(epochs)]
    assert next(epoch for epoch, count in enumerate(counts) if count) == first
    assert counts[-1] == last
    assert counts == sorted(counts)


def test_presets_are_points_of_one_family():
    fractions = {
        name: (strategy.fraction(0, 2), strategy.fraction(1, 2))
        for name, strategy in STRATEGIES.items()
    }
    assert fractions == {
        "random": (0, 0),
        "easy_to_hard": (0.25, 0.5),
        "hard_to_easy": (0.25, 0),
        "hardest": (1, 1),
        "easiest": (1, 1),
    }
    assert not STRATEGIES["random"].picks


def test_chance_of_a_patch_that_is_not_hard_to_be_hidden_anyway():
    difficulty = torch.arange(196.0).repeat(4000, 1)
    priority = uniform(torch.arange(4000), 196, "mask")
    masked = choose_masked(difficulty, priority, num_masked=147, num_hardest=73)
    others = masked[:, : 196 - 73].float()
    assert others.mean().item() == pytest.approx(74 / 123, abs=1e-6)
    assert (others.mean(dim=0) - 74 / 123).abs().max() < 0.04  # five standard errors of 4000 draws


def test_easiest_hides_what_scores_lowest():
    rule = MaskRule(TokenGrid(1, 2, 4), "token", 3, STRATEGIES["easiest"])
    mask = rule.draw(torch.arange(8.0).unsqueeze(0), torch.rand(1, 8), num_picked=3)
    assert mask.masked_ids.tolist() == [[0, 1, 2]]


@given(grid=grids, data=st.data())
def test_mask_hides_exactly_the_requested_units_and_the_hardest_first(grid, data):
    num_masked = data.draw(st.integers(0, grid.num_tokens))
    num_hardest = data.draw(st.integers(0, num_masked))
    difficulty = torch.randn(3, grid.num_tokens)

    masked = choose_masked(difficulty, torch.rand(3, grid.num_tokens), num_masked, num_hardest)

    assert masked.sum(dim=1).tolist() == [num_masked] * 3
    hardest = difficulty.topk(num_hardest, dim=1).indices
    assert masked.gather(1, hardest).all()


@given(grid=grids, data=st.data())
def test_merge_undoes_take(grid, data):
    num_masked = data.draw(st.integers(0, grid.num_tokens))
    tokens = torch.randn(2, grid.num_tokens, 5)
    chosen = choose_masked(None, torch.rand(2, grid.num_tokens), num_masked, num_hardest=0)
    mask = TokenMask.from_masked(chosen, num_masked)

    merged = mask.merge(mask.take_visible(tokens), mask.take_masked(tokens))

    assert torch.equal(merged, tokens)
    assert torch.equal(mask.take_merged(merged), mask.take_masked(tokens))
    thin = mask.thinned(torch.rand(2, grid.num_tokens), num_masked // 2)
    kept = thin.merge(thin.take_visible(tokens), thin.take_masked(tokens))
    assert torch.equal(thin.take_merged(kept), thin.take_masked(tokens))
    left_out = mask.masked & ~torch.zeros_like(mask.masked).scatter(1, thin.masked_ids, value=True)
    assert torch.equal(kept.flatten(0, 1), tokens[~left_out])
    assert torch.equal(mask.masked.sum(dim=1), torch.full((2,), num_masked))


def test_each_hidden_token_and_each_pair_is_predicted_equally_often():
    masked = torch.tensor([[True, False, True, True, False, True]])
    mask = TokenMask.from_masked(masked.expand(9000, -1), 4)
    thin = mask.thinned(uniform(torch.arange(9000), 6, "test"), 2)
    assert torch.equal(thin.masked, mask.masked)
    assert torch.equal(thin.visible_ids, mask.visible_ids)
    assert (thin.masked_ids.diff() > 0).all()
    pairs, counts = thin.masked_ids.unique(dim=0, return_counts=True)
    assert pairs.tolist() == [[*pair] for pair in itertools.combinations([0, 2, 3, 5], 2)]
    assert (counts - 1500).abs().max() < 4 * (9000 * 1 / 6 * 5 / 6) ** 0.5


@given(grid=grids)
def test_tube_hides_a_position_at_every_time(grid):
    units = torch.rand(2, grid.tokens_per_step) < 0.5
    masked = units_to_tokens(units, grid, "tube").unflatten(1, (grid.time, -1))
    assert torch.equal(masked, units.unsqueeze(1).expand_as(masked))


def test_tube_scores_are_averaged_over_time():
    scores = torch.rand(2, VIDEO.num_tokens)
    expected = torch.stack([scores[:, t * 196 : (t + 1) * 196] for t in range(8)]).mean(dim=0)
    torch.testing.assert_close(tokens_to_units(scores, VIDEO, "tube"), expected)


def test_an_image_has_the_same_units_under_both_rules():
    scores = torch.rand(2, IMAGE.num_tokens)
    for unit in ("tube", "token"):
        torch.testing.assert_close(tokens_to_units(scores, IMAGE, unit), scores)
    assert MaskRule(IMAGE, "tube", 147, STRATEGIES["random"]).num_units == 196


def test_equal_draws_are_ordered_by_position():
    masked = choose_masked(None, torch.zeros(1, 6), num_masked=2, num_hardest=0)
    assert masked.tolist() == [[True, True, False, False, False, False]]


def test_impossible_requests_name_the_numbers():
    with pytest.raises(ValueError, match="got 3, 2, 4"):
        choose_masked(torch.zeros(1, 4), torch.rand(1, 4), num_masked=2, num_hardest=3)
    with pytest.raises(ValueError, match="the 2 hardest units needs their difficulty"):
        choose_masked(None, torch.rand(1, 4), num_masked=2, num_hardest=2)


def test_grid_that_patches_do_not_divide_names_the_nearest():
    with pytest.raises(ValueError, match="height of a clip .* got 100 with patch 16.* 96 and 112"):
        TokenGrid.of_clip((16, 100, 224), (2, 16, 16))


def test_keyed_draws_are_uniform_independent_and_repeatable():
    keys = torch.arange(-2000, 2000)
    draws = uniform(keys, 50, "mask")
    assert torch.equal(draws, uniform(keys, 50, "mask"))
    assert torch.equal(draws[:7, :20], uniform(keys[:7], 20, "mask"))
    assert not torch.equal(draws, uniform(keys, 50, "drop path"))
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = torch.histc(draws, bins=20, min=0, max=1) / draws.numel()
    assert (histogram - 0.05).abs().max() < 0.003
    correlation = torch.corrcoef(draws.T) - torch.eye(50)
    assert correlation.abs().max() < 0.1
    neighbours = [
        torch.corrcoef(torch.stack(pair))[0, 1] for pair in itertools.pairwise(draws[:200])
    ]
    assert abs(sum(neighbours) / len(neighbours)) < 0.05


def test_hash_equals_splitmix64_in_plain_integers():
    def splitmix(state: int) -> int:
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        return state ^ (state >> 31)

    from hpm_video.randomness import key_of

    key = -(2**62) - 12345
    state = (key ^ key_of("mask")) % 2**64
    expected = [
        (splitmix((state + n * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24 for n in range(1, 9)
    ]
    assert uniform(torch.tensor([key]), 8, "mask").tolist() == [expected]
