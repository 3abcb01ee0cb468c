import math
from functools import partial

import numpy as np
import pytest
import torch
from geometry import Geometry, score_all

from hpm_video.config.choices import TransformerSize
from hpm_video.models.positions import position_table
from hpm_video.models.vit import Transformer
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import TokenMask, choose_masked
from hpm_video.tokens.patches import patchify

SMALL = TransformerSize(32, 2, 4)
SIZES = {  # METHOD.md: parameters of VideoMAE's pre-training model in millions
    "S": (TransformerSize(384, 12, 6), TransformerSize(192, 4, 3), 24.03),
    "B": (TransformerSize(768, 12, 12), TransformerSize(384, 4, 6), 94.21),
    "L": (TransformerSize(1024, 24, 16), TransformerSize(512, 12, 8), 343.00),
    "H": (TransformerSize(1280, 32, 16), TransformerSize(640, 12, 8), 692.49),
}


def shape_of(clip=(4, 32, 32), patch=(2, 8, 8), size=SMALL, positions="sequence", **options):
    return Geometry(TokenGrid.of_clip(clip, patch), patch, size, positions, **options)


def make(shape=None, seed=0, **options):
    torch.manual_seed(seed)
    return (shape or shape_of()).autoencoder(SMALL, **options)


def random_mask(model, batch=2, ratio=0.75):
    num_tokens = model.grid.num_tokens
    count = int(num_tokens * ratio)
    priority = torch.rand(batch, num_tokens)
    return TokenMask.from_masked(choose_masked(None, priority, count, 0), count)


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters_is_videomaes(name):
    encoder, decoder, millions = SIZES[name]
    shape = shape_of((16, 224, 224), (2, 16, 16), encoder)
    with torch.device("meta"):
        plain = shape.autoencoder(decoder, predictor=False)
        mining = shape.autoencoder(decoder)
    count = sum(p.numel() for p in plain.parameters())
    key_biases = encoder.depth * encoder.dim + decoder.depth * decoder.dim
    assert round((count - key_biases) / 1e6, 2) == millions, "VideoMAE has no bias on the keys"
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
    model = make(shape_of(clip, patch, channels=channels))
    mask = random_mask(model)
    prediction = model(torch.rand(2, channels, *clip), mask)
    num_masked = mask.masked_ids.shape[1]
    assert prediction.content.shape == (2, num_masked, channels * patch[0] * patch[1] * patch[2])
    assert prediction.difficulty.shape == (2, num_masked)
    assert score_all(model, torch.rand(2, channels, *clip)).shape == (2, model.grid.num_tokens)


def test_hidden_pixels_are_not_seen():
    model = make().eval()
    mask = random_mask(model, batch=1)
    clips = torch.rand(1, 3, 4, 32, 32)
    hidden = mask.masked.view(1, 1, 2, 4, 4).repeat_interleave(2, 2)
    hidden = hidden.repeat_interleave(8, 3).repeat_interleave(8, 4)
    changed = torch.where(hidden, torch.rand_like(clips), clips)
    assert torch.equal(model(clips, mask).content, model(changed, mask).content)
    assert not torch.equal(model(clips, mask).content, model(clips + 1, mask).content)


def test_scores_for_all_tokens_do_not_run_the_reconstructor():
    model = make()
    model.reconstructor.register_forward_hook(lambda *_: pytest.fail("reconstructor ran"))
    score_all(model, torch.rand(1, 3, 4, 32, 32))


@pytest.mark.parametrize("class_token", [False, True])
def test_hidden_tokens_are_scored_as_the_student_scores_them(class_token):
    """This is what a teacher computes that sees only a part of the clip."""
    model, clips = make(shape_of(class_token=class_token)), torch.rand(2, 3, 4, 32, 32)
    mask = random_mask(model, ratio=0.5)
    scores = model.score(model.encode(clips, mask=mask), model.grid, mask)
    assert scores.shape == (2, model.grid.num_tokens)
    torch.testing.assert_close(scores.gather(1, mask.masked_ids), model(clips, mask).difficulty)
    nothing = TokenMask.from_masked(torch.zeros_like(mask.masked), 0)
    all_seen = model.score(model.encode(clips, mask=nothing), model.grid, nothing)
    torch.testing.assert_close(all_seen, score_all(model, clips))


def test_decoders_read_only_the_tokens_that_are_predicted():
    model, clips = make(), torch.rand(2, 3, 4, 32, 32)
    mask = random_mask(model)
    thin = mask.thinned(torch.rand(2, model.grid.num_tokens), 5)
    read = [
        seen_by(decoder.blocks[0]) for decoder in (model.reconstructor, model.difficulty_decoder)
    ]
    prediction = model(clips, thin)
    assert [tokens[0].shape[1] for tokens in read] == [mask.visible_ids.shape[1] + 5] * 2
    assert prediction.content.shape[:2] == prediction.difficulty.shape == (2, 5)
    for clip in range(2):
        kept = torch.cat([mask.visible_ids[clip], thin.masked_ids[clip]]).sort().values
        codes = read[0][0][clip] - model.positions("decoder_pos_embed", model.grid)[kept]
        is_hidden = torch.isin(kept, thin.masked_ids[clip])
        expected = model.mask_token[0].expand(5, -1)
        torch.testing.assert_close(codes[is_hidden], expected, rtol=1e-4, atol=1e-5)


def test_model_without_predictor_says_so():
    model = make(predictor=False)
    assert model(torch.rand(2, 3, 4, 32, 32), random_mask(model)).difficulty is None
    with pytest.raises(ValueError, match="no loss predictor"):
        score_all(model, torch.rand(2, 3, 4, 32, 32))


def test_first_scores_are_nearly_equal():
    scores = score_all(make(), torch.rand(2, 3, 4, 32, 32))
    assert scores.std() < 0.1


def test_recomputed_activations_give_the_same_gradients():
    clips, keys = torch.rand(2, 3, 4, 32, 32), torch.tensor([5, 6])
    gradients = []
    for recompute in (False, True):
        model = make(checkpoint_activations=recompute, drop_path=0.5)
        torch.manual_seed(1)
        prediction = model(clips, random_mask(model), keys)
        (prediction.content.sum() + prediction.difficulty.sum()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_stochastic_depth_depends_on_the_sample_alone():
    transformer = Transformer(SMALL, drop_path=0.6)
    tokens, keys = torch.rand(6, 5, 32), torch.arange(6)
    together = transformer.run_blocks(tokens, transformer.draws(keys))
    alone = transformer.run_blocks(tokens[3:4], transformer.draws(keys[3:4]))
    torch.testing.assert_close(together[3:4], alone)
    assert transformer.draws(None) is None


def test_stochastic_depth_keeps_the_mean_and_rises_over_the_blocks():
    transformer = Transformer(TransformerSize(8, 3, 2), drop_path=0.4)
    given = []
    for block in transformer.blocks:
        block.forward = lambda tokens, scales: given.append(scales) or tokens
    transformer.run_blocks(torch.ones(4000, 1, 8), torch.rand(4000, 6))
    for scales, kept in zip(given, (1, 0.8, 0.6), strict=True):
        assert scales.unique().tolist() == pytest.approx([0, 1 / kept] if kept < 1 else [1])
        assert scales.mean(dim=0).tolist() == pytest.approx([1, 1], abs=0.07)


def test_a_block_scales_its_two_residuals_apart():
    block, tokens = Transformer(SMALL).blocks[0], torch.randn(3, 7, 32)
    scales = torch.tensor([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    out = block(tokens, scales)
    torch.testing.assert_close(out[0], block(tokens)[0])
    expected = tokens[1] + 2 * block.mlp(block.norm2(tokens[1]))
    torch.testing.assert_close(out[1], expected)
    assert torch.equal(out[2], tokens[2])


def test_block_equals_timms():
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours = Transformer(SMALL).blocks[0]
    theirs = timm.Block(32, 4, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("patch", "channels"), [((2, 8, 8), 3), ((1, 4, 8), 2)])
def test_the_patch_embedding_is_a_convolution(patch, channels):
    model = make(shape_of(patch=patch, channels=channels))
    clips = torch.rand(2, channels, 4, 32, 32)
    expected = model.patch_embed.proj(clips).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.patch_embed(patchify(clips, patch)), expected)


def test_given_positions_are_a_table_that_checkpoints_keep():
    model = make(shape_of(positions="given", class_token=True))
    state = model.state_dict()
    tables = {name: value.shape for name, value in state.items() if "pos" in name}
    assert tables == {"pos_embed": (1, 32, 32), "decoder_pos_embed": (1, 32, 32)}
    state["pos_embed"].normal_()
    assert torch.equal(model.positions("pos_embed", model.grid), state["pos_embed"][0])


def test_positions_are_interleaved_sine_and_cosine():
    table = position_table(TokenGrid(8, 14, 14), 8, "sequence")
    assert table.shape == (1568, 8)
    assert table.dtype == torch.float32
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    angle = torch.tensor(37 / 10000 ** (2 / 8), dtype=torch.float64)
    torch.testing.assert_close(table[37, 2:4], torch.stack([angle.sin(), angle.cos()]).float())


def coordinates(grid, source):
    """The centres of the tokens in a pre-training grid, whose own tokens are at whole numbers."""
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
    # The rates are float32, so an index of a thousand is inexact by 1e-4.
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
    """With twice the frames, two tokens lie a quarter of a token before and after each old one."""
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
    """MAE's table by definition: for each position sines and cosines of column, then of row."""
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
    torch.testing.assert_close(steps, steps[:, :1].expand(4, 15, 16))  # the same at every position
    assert steps[1:].abs().amax(dim=-1).min() > 0.5
    with pytest.raises(ValueError, match="a width divisible by 4, got 6"):
        position_table(TokenGrid(1, 2, 2), 6, "space_time")


def test_scores_are_not_rounded_by_mixed_precision():
    model = make()
    mask, clips = random_mask(model), torch.rand(2, 3, 4, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(clips, mask)
        scores = score_all(model, clips)
    for values in (prediction.difficulty, scores):
        assert values.dtype == torch.float32
        assert not torch.equal(values, values.bfloat16().float())
    head = model.difficulty_decoder.head
    tokens = torch.rand(2, 5, 32)
    expected = torch.nn.functional.linear(tokens, head.weight, head.bias)
    ours = (tokens.unsqueeze(-2) * head.weight).sum(-1) + head.bias
    torch.testing.assert_close(ours, expected)


# --- The class token ----------------------------------------------------------------------------


def seen_by(module):
    """A list to which each call of a module appends its input."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


CLIPS = (2, 3, 4, 32, 32)


@pytest.mark.parametrize("conventions", ["videomae", "mae"])
@pytest.mark.parametrize("positions", ["sequence", "space_time"])
def test_a_class_token_changes_no_shape_of_the_outputs(conventions, positions):
    shape = shape_of(class_token=True, conventions=conventions, positions=positions)
    model, clips = make(shape), torch.rand(CLIPS)
    mask = random_mask(model)
    prediction = model(clips, mask)
    assert prediction.content.shape == (2, 24, 3 * 2 * 8 * 8)
    assert prediction.difficulty.shape == (2, 24)
    assert score_all(model, clips).shape == (2, 32)
    for tokens, count in ((model.encode(clips), 32), (model.encode(clips, mask=mask), 8)):
        assert tokens.shape == (2, 1 + count, 32)
        assert torch.equal(model.of_clip(tokens), tokens[:, 1:])
        assert torch.equal(model.pool(tokens), tokens[:, 0])


def test_without_a_class_token_the_mean_stands_for_the_clip():
    model = make()
    tokens = model.encode(torch.rand(CLIPS))
    assert model.cls_token is None
    assert torch.equal(model.of_clip(tokens), tokens)
    torch.testing.assert_close(model.pool(tokens), tokens.mean(dim=1))


def test_the_class_token_goes_first_and_has_no_position():
    model, clips = make(shape_of(class_token=True)), torch.rand(CLIPS)
    mask = random_mask(model)
    in_encoder = seen_by(model.blocks[0])
    in_decoders = [
        seen_by(decoder.blocks[0]) for decoder in (model.reconstructor, model.difficulty_decoder)
    ]
    model(clips, mask)
    assert in_encoder[0].shape == (2, 1 + 8, 32)
    assert torch.equal(in_encoder[0][:, 0], model.cls_token[0].expand(2, -1))
    embedded = model.decoder_embed(model.encode(clips, mask=mask))
    for (sequence,) in in_decoders:
        assert sequence.shape == (2, 1 + 32, 32)
        torch.testing.assert_close(sequence[:, 0], embedded[:, 0])
        codes = sequence[:, 1:] - model.positions("decoder_pos_embed", model.grid)
        torch.testing.assert_close(mask.take_visible(codes), embedded[:, 1:], rtol=1e-4, atol=1e-5)
        hidden = model.mask_token.expand(2, 24, -1)
        torch.testing.assert_close(mask.take_masked(codes), hidden, rtol=1e-4, atol=1e-5)


def test_the_class_token_learns_from_both_decoders_and_tells_of_the_clip():
    model, clips = make(shape_of(class_token=True)), torch.rand(CLIPS)
    prediction = model(clips, random_mask(model))
    for part in prediction:
        (gradient,) = torch.autograd.grad(part.square().sum(), model.cls_token, retain_graph=True)
        assert gradient.abs().sum() > 0
    pooled = model.pool(model.encode(clips))
    assert not torch.allclose(pooled[0], pooled[1])


def test_nothing_else_starts_otherwise_for_a_class_token():
    plain, with_token = make().state_dict(), make(shape_of(class_token=True)).state_dict()
    assert set(with_token) - set(plain) == {"cls_token"}
    before_it = [name for name in plain if name.startswith(("blocks.", "patch_embed."))]
    assert all(torch.equal(plain[name], with_token[name]) for name in before_it)


# --- Conventions --------------------------------------------------------------------------------


def test_what_the_conventions_of_mae_add():
    with torch.device("meta"):
        videomae, mae = (
            make(shape_of(class_token=True, conventions=name)) for name in ("videomae", "mae")
        )
    added = set(mae.state_dict()) - set(videomae.state_dict())
    assert added == {"decoder_embed.bias"}
    assert set(videomae.state_dict()) < set(mae.state_dict())
    assert mae.decayed_tokens == ("cls_token", "mask_token")
    assert videomae.decayed_tokens == ()


def test_initial_weights_of_mae():
    size = TransformerSize(256, 1, 4)
    model = shape_of(size=size, class_token=True, conventions="mae").autoencoder(
        TransformerSize(512, 1, 4)
    )
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2)
    for module in (model.patch_embed.proj, model.decoder_embed, model.blocks[0].mlp.fc1):
        rows, columns = module.weight.flatten(1).shape
        limit = math.sqrt(6 / (rows + columns))
        assert 0.98 * limit < module.weight.abs().max() <= limit
    assert not model.decoder_embed.bias.any()
    assert not model.blocks[0].attn.qkv.bias.any()


def test_the_bias_of_the_keys_is_that_and_nothing_else():
    """The softmax ignores it, which it would not do if the bias were added to anything else."""
    attention = Transformer(SMALL).blocks[0].attn
    q_bias, k_bias, _ = attention.qkv.bias.detach().chunk(3)
    tokens = torch.rand(2, 5, 32)
    before = attention(tokens)
    torch.nn.init.normal_(k_bias)
    torch.testing.assert_close(attention(tokens), before, rtol=1e-4, atol=1e-5)
    torch.nn.init.normal_(q_bias)
    assert not torch.allclose(attention(tokens), before, atol=1e-3)


# --- Clips of several grids ---------------------------------------------------------------------

LONG, SHORT, WIDE = TokenGrid(3, 4, 4), TokenGrid(1, 4, 4), TokenGrid(1, 2, 6)


def mixed_shape(positions="sequence"):
    return shape_of((6, 32, 32), positions=positions, other_grids=(SHORT, WIDE))


@pytest.mark.parametrize("positions", ["sequence", "space_time"])
@pytest.mark.parametrize(
    ("clip", "grid"), [((6, 32, 32), LONG), ((2, 32, 32), SHORT), ((2, 16, 48), WIDE)]
)
def test_clips_of_several_grids_go_through_one_model(positions, clip, grid):
    model, clips = make(mixed_shape(positions)), torch.rand(2, 3, *clip)
    num_masked = grid.num_tokens * 3 // 4
    priority = torch.rand(2, grid.num_tokens)
    mask = TokenMask.from_masked(choose_masked(None, priority, num_masked, 0), num_masked)
    prediction = model(clips, mask)
    assert prediction.content.shape == (2, num_masked, 3 * 2 * 8 * 8)
    assert prediction.difficulty.shape == (2, num_masked)
    assert score_all(model, clips).shape == (2, grid.num_tokens)
    assert model.encode(clips).shape == (2, grid.num_tokens, 32)


@pytest.mark.parametrize("positions", ["sequence", "space_time"])
def test_one_time_step_lies_in_the_middle_of_the_clips_of_the_main_grid(positions):
    model = make(mixed_shape(positions))
    for name in ("pos_embed", "decoder_pos_embed"):
        middle_step = model.positions(name, LONG)[16:32]
        assert torch.equal(model.positions(name, SHORT), middle_step)
        in_long = position_table(WIDE, 32, positions, LONG)
        assert torch.equal(model.positions(name, WIDE), in_long)


@pytest.mark.parametrize("positions", ["sequence", "space_time"])
def test_other_grids_change_nothing_for_the_main_one(positions):
    mixed = make(mixed_shape(positions))
    alone = make(shape_of((6, 32, 32), positions=positions))
    assert mixed.state_dict().keys() == alone.state_dict().keys()
    clips = torch.rand(2, 3, 6, 32, 32)
    assert torch.equal(score_all(mixed, clips), score_all(alone, clips))


def test_a_clip_of_another_grid_is_refused():
    model = make(mixed_shape())
    message = r"made for clips of 3x4x4 or 1x4x4 or 1x2x6 tokens \(time .* got 2x4x4"
    with pytest.raises(ValueError, match=message):
        model.encode(torch.rand(1, 3, 4, 32, 32))
