import math
from functools import partial

import numpy as np
import pytest
import torch

from hpm_video.masking import TokenMask, choose_masked
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.models.pos_embed import position_table
from hpm_video.models.vit import Transformer, TransformerSize
from hpm_video.token_grid import TokenGrid

SMALL = TransformerSize(32, 2, 4)
SIZES = {  # METHOD: parameters of VideoMAE's pre-training model in millions
    "S": (TransformerSize(384, 12, 6), TransformerSize(192, 4, 3), 24.03),
    "B": (TransformerSize(768, 12, 12), TransformerSize(384, 4, 6), 94.21),
    "L": (TransformerSize(1024, 24, 16), TransformerSize(512, 12, 8), 343.00),
    "H": (TransformerSize(1280, 32, 16), TransformerSize(640, 12, 8), 692.49),
}


def make(clip=(4, 32, 32), patch=(2, 8, 8), seed=0, **options):
    torch.manual_seed(seed)
    return MaskedAutoencoder(TokenGrid.of_clip(clip, patch), patch, SMALL, SMALL, **options)


def random_mask(model, batch=2, ratio=0.75):
    count = int(model.grid.num_tokens * ratio)
    priority = torch.rand(batch, model.grid.num_tokens)
    return TokenMask.from_masked(choose_masked(None, priority, count, 0), count)


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters_is_videomaes(name):
    encoder, decoder, millions = SIZES[name]
    grid = TokenGrid.of_clip((16, 224, 224), (2, 16, 16))
    with torch.device("meta"):
        plain = MaskedAutoencoder(grid, (2, 16, 16), encoder, decoder, predictor=False)
        mining = MaskedAutoencoder(grid, (2, 16, 16), encoder, decoder)
    count = sum(p.numel() for p in plain.parameters())
    assert round(count / 1e6, 2) == millions
    predictor = sum(p.numel() for p in mining.difficulty_decoder.parameters())
    assert sum(p.numel() for p in mining.parameters()) == count + predictor


@pytest.mark.parametrize(
    ("clip", "patch", "channels"),
    [
        ((4, 32, 32), (2, 8, 8), 3),
        ((6, 24, 40), (3, 8, 8), 3),  # rectangular
        ((1, 32, 48), (1, 16, 16), 3),  # an image
        ((2, 16, 16), (2, 4, 4), 1),
        ((2, 16, 16), (1, 8, 8), 5),
    ],
)
def test_any_shape_that_patches_divide(clip, patch, channels):
    model = make(clip, patch, channels=channels)
    mask = random_mask(model)
    prediction = model(torch.rand(2, channels, *clip), mask)
    num_masked = mask.masked_ids.shape[1]
    assert prediction.pixels.shape == (2, num_masked, channels * patch[0] * patch[1] * patch[2])
    assert prediction.difficulty.shape == (2, num_masked)
    assert model.score_all(torch.rand(2, channels, *clip)).shape == (2, model.grid.num_tokens)


def test_hidden_pixels_are_not_seen():
    model = make().eval()
    mask = random_mask(model, batch=1)
    clips = torch.rand(1, 3, 4, 32, 32)
    hidden = mask.masked.view(1, 1, 2, 4, 4).repeat_interleave(2, 2)
    hidden = hidden.repeat_interleave(8, 3).repeat_interleave(8, 4)
    changed = torch.where(hidden, torch.rand_like(clips), clips)
    assert torch.equal(model(clips, mask).pixels, model(changed, mask).pixels)
    assert not torch.equal(model(clips, mask).pixels, model(clips + 1, mask).pixels)


def test_scores_for_all_tokens_do_not_run_the_reconstructor():
    model = make()
    model.pixel_decoder.register_forward_hook(lambda *_: pytest.fail("reconstructor ran"))
    model.score_all(torch.rand(1, 3, 4, 32, 32))


def test_model_without_predictor_says_so():
    model = make(predictor=False)
    assert model(torch.rand(2, 3, 4, 32, 32), random_mask(model)).difficulty is None
    with pytest.raises(ValueError, match="no loss predictor"):
        model.score_all(torch.rand(2, 3, 4, 32, 32))


def test_first_scores_are_nearly_equal():
    scores = make().score_all(torch.rand(2, 3, 4, 32, 32))
    assert scores.std() < 0.1


def test_recomputed_activations_give_the_same_gradients():
    clips, keys = torch.rand(2, 3, 4, 32, 32), torch.tensor([5, 6])
    gradients = []
    for recompute in (False, True):
        model = make(checkpoint_activations=recompute, drop_path=0.5)
        torch.manual_seed(1)
        prediction = model(clips, random_mask(model), keys)
        (prediction.pixels.sum() + prediction.difficulty.sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_stochastic_depth_depends_on_the_sample_alone():
    transformer = Transformer(SMALL, drop_path=0.6)
    tokens, keys = torch.rand(6, 5, 32), torch.arange(6)
    together = transformer(tokens, transformer.draws(keys))
    alone = transformer(tokens[3:4], transformer.draws(keys[3:4]))
    torch.testing.assert_close(together[3:4], alone)
    assert transformer.draws(None) is None


def test_stochastic_depth_keeps_the_mean_and_rises_over_the_blocks():
    transformer = Transformer(TransformerSize(8, 3, 2), drop_path=0.4)
    assert [block.drop_path for block in transformer.blocks] == pytest.approx([0, 0.2, 0.4])
    block = transformer.blocks[2]
    residual = torch.ones(4000, 1, 1)
    dropped = block._maybe_drop(residual, torch.rand(4000, 2), branch=0)
    assert dropped.mean().item() == pytest.approx(1, abs=0.07)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])


def test_block_equals_timms():
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours = Transformer(SMALL).blocks[0]
    theirs = timm.Block(32, 4, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = ours.state_dict()
    q, v = state.pop("attn.q_bias"), state.pop("attn.v_bias")
    state["attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    renamed = {k.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2"): state[k] for k in state}
    theirs.load_state_dict(renamed)
    tokens = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


def test_positions_are_interleaved_sine_and_cosine():
    table = position_table(TokenGrid(8, 14, 14), 8, "sequence")
    assert table.shape == (1568, 8)
    assert table.dtype == torch.float32
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    angle = torch.tensor(37 / 10000 ** (2 / 8), dtype=torch.float64)
    torch.testing.assert_close(table[37, 2:4], torch.stack([angle.sin(), angle.cos()]).float())


def coordinates(grid, source):
    """Where the tokens' centres lie in a grid of pre-training, its own tokens' at whole numbers."""
    lengths = zip(
        (grid.time, grid.height, grid.width),
        (source.time, source.height, source.width),
        strict=True,
    )
    return [[(i + 0.5) / n * m - 0.5 for i in range(n)] for n, m in lengths]


def sequence_code(index, dim):
    return [
        (math.cos if j % 2 else math.sin)(index / 10000 ** (2 * (j // 2) / dim)) for j in range(dim)
    ]


def half_and_half(x, dim):
    rates = [10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
    return [f(x * rate) for f in (math.sin, math.cos) for rate in rates]


PRETRAINED = TokenGrid(8, 14, 14)
RESIZED = [
    TokenGrid(16, 14, 14),
    TokenGrid(8, 20, 20),
    TokenGrid(4, 14, 14),
    TokenGrid(8, 7, 28),
    TokenGrid(1, 3, 5),
]


@pytest.mark.parametrize("kind", ["sequence", "space_time"])
@pytest.mark.parametrize("grid", [PRETRAINED, TokenGrid(3, 5, 7), TokenGrid(1, 6, 4)])
def test_positions_in_the_grid_of_pretraining_are_the_plain_ones_to_the_bit(kind, grid):
    placed = position_table(grid, 24, kind, TokenGrid(grid.time, grid.height, grid.width))
    assert torch.equal(placed, position_table(grid, 24, kind))


def test_plain_positions_are_those_of_whole_indices():
    expected = [sequence_code(index, 16) for index in range(1568)]
    table = position_table(PRETRAINED, 16, "sequence")
    # The rates are float32, which makes an index of a thousand inexact by 1e-4.
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", RESIZED)
def test_sequence_positions_in_another_grid_are_at_fractional_indices(grid):
    times, rows, columns = coordinates(grid, PRETRAINED)
    expected = [
        sequence_code((14 * t + h) * 14 + w, 16) for t in times for h in rows for w in columns
    ]
    table = position_table(grid, 16, "sequence", PRETRAINED)
    assert table.shape == (grid.num_tokens, 16)
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", RESIZED)
def test_space_time_positions_in_another_grid_are_at_fractional_coordinates(grid):
    times, rows, columns = coordinates(grid, PRETRAINED)
    at_start = np.array(half_and_half(0.0, 16))
    expected = [
        np.array(half_and_half(w, 8) + half_and_half(h, 8)) + half_and_half(t, 16) - at_start
        for t in times
        for h in rows
        for w in columns
    ]
    table = position_table(grid, 16, "space_time", PRETRAINED)
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-6)


def test_centres_keep_their_place_when_time_doubles():
    """Two tokens of a clip of twice the frames lie a quarter of a token around one of before."""
    times, rows, columns = coordinates(TokenGrid(16, 14, 14), PRETRAINED)
    assert times[:4] == [-0.25, 0.25, 0.75, 1.25]
    assert rows == columns == list(range(14))
    table = position_table(TokenGrid(16, 14, 14), 16, "sequence", PRETRAINED)
    np.testing.assert_allclose(table[0], sequence_code(-49, 16), rtol=0, atol=1e-5)
    np.testing.assert_allclose(table[196], sequence_code(49, 16), rtol=0, atol=1e-5)


def test_positions_are_in_no_checkpoint():
    assert not [name for name in make().state_dict() if "pos" in name]


@pytest.mark.parametrize("size", [(30, 2, 4), (32, 0, 4), (12, 1, 4)])
def test_impossible_transformer_names_the_numbers(size):
    with pytest.raises(ValueError, match=f"got dim {size[0]}, depth {size[1]}"):
        TransformerSize(*size)


def test_space_time_positions_of_an_image_are_maes():
    """MAE's table from its definition: per position, sines and cosines of column, then of row."""
    grid, dim = TokenGrid(1, 3, 5), 16
    rates = [10000 ** (-i / 4) for i in range(4)]
    for row in range(3):
        for column in range(5):
            expected = [
                f(x * r) for x in (column, row) for f in (math.sin, math.cos) for r in rates
            ]
            code = position_table(grid, dim, "space_time")[row * 5 + column]
            assert code.tolist() == pytest.approx(expected, abs=1e-6)


def test_space_time_positions_add_a_code_of_time_that_begins_at_zero():
    image, video = (position_table(TokenGrid(t, 3, 5), 16, "space_time") for t in (1, 4))
    assert torch.equal(video[:15], image)
    steps = video.view(4, 15, 16) - image
    torch.testing.assert_close(steps, steps[:, :1].expand(4, 15, 16))  # the same at every place
    assert steps[1:].abs().amax(dim=-1).min() > 0.5
    with pytest.raises(ValueError, match="a width that 4 divides, got 6"):
        position_table(TokenGrid(1, 2, 2), 6, "space_time")


def test_scores_are_not_rounded_by_mixed_precision():
    model = make()
    mask, clips = random_mask(model), torch.rand(2, 3, 4, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(clips, mask)
        scores = model.score_all(clips)
    for values in (prediction.difficulty, scores):
        assert values.dtype == torch.float32
        assert not torch.equal(values, values.bfloat16().float())
    head = model.difficulty_decoder.head
    tokens = torch.rand(2, 5, 32)
    expected = torch.nn.functional.linear(tokens, head.weight, head.bias)
    ours = (tokens.unsqueeze(-2) * head.weight).sum(-1) + head.bias
    torch.testing.assert_close(ours, expected)
