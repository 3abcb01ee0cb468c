"""What METHOD.md says about the official models for images, computed by our code."""

import math

import pytest
import torch
from geometry import Geometry
from torch import nn

from hpm_video.config.choices import TransformerSize
from hpm_video.randomness import uniform
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import STRATEGIES, MaskRule, TokenMask, count_masked
from hpm_video.training.optim import parameter_groups

IMAGE = TokenGrid.of_clip((1, 224, 224), (1, 16, 16))
DECODER = TransformerSize(512, 8, 16)
MODELS = {  # size, side of a patch, learned parameters of ours, parameters of the official layout
    "B": (TransformerSize(768, 12, 12), 16, 136_876_289, 137_521_920),
    "L": (TransformerSize(1024, 24, 16), 16, 354_459_905, 355_155_968),
    "H": (TransformerSize(1280, 32, 16), 14, 681_834_573, 682_596_248),
}


def image_rule(unit="token"):
    num_masked = count_masked(IMAGE.num_tokens, 0.75, "hpm")
    return MaskRule(IMAGE, unit, num_masked, STRATEGIES["easy_to_hard"])


def make(size, side=16, pixels=224, decoder=DECODER, **options):
    grid = TokenGrid.of_clip((1, pixels, pixels), (1, side, side))
    shape = Geometry(grid, (1, side, side), size, "space_time", class_token=True, conventions="mae")
    return shape.autoencoder(decoder, **options)


def make_shallow(side=16, pixels=32):
    """The widths of ViT-B and its decoders, with one block each."""
    torch.manual_seed(0)
    return make(TransformerSize(768, 1, 12), side, pixels, TransformerSize(512, 1, 16))


def on_meta(name, **options):
    size, side, *_ = MODELS[name]
    with torch.device("meta"):
        return make(size, side, **options)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("unit", ["token", "tube"])
def test_an_image_shows_49_and_hides_147(unit):
    rule = image_rule(unit)
    mask = rule.draw(None, uniform(torch.arange(5), rule.num_units, "mask"), num_picked=0)
    assert (mask.visible_ids.shape, mask.masked_ids.shape) == ((5, 49), (5, 147))


@pytest.mark.parametrize(("epochs", "first"), [(200, 2), (800, 10), (1600, 21)])
def test_hard_count_of_every_epoch(epochs, first):
    counts = [image_rule().num_picked(epoch, epochs) for epoch in range(epochs)]
    assert counts == [147 * (epoch + 1) // (2 * epochs) for epoch in range(epochs)]
    assert (counts.index(1), counts[-1]) == (first, 73)


def test_last_epoch_of_an_image_hides_73_hard_tokens_and_74_of_the_others():
    rule, clips = image_rule(), 4000
    ranks = uniform(torch.arange(clips), 196, "difficulty").argsort(dim=1)  # 0: the easiest
    mask = rule.draw(ranks.float(), uniform(torch.arange(clips), 196, "mask"), num_picked=73)
    by_rank = torch.zeros(clips, 196).scatter_(1, ranks, mask.masked.float())
    assert by_rank[:, 196 - 73 :].all()
    others = by_rank[:, : 196 - 73]
    assert torch.equal(others.sum(dim=1), torch.full((clips,), 74.0))
    # Whatever its rank or place: six standard errors of a mean over as many draws.
    chance = 74 / 123
    assert round(chance, 4) == 0.6016
    six = 6 * math.sqrt(chance * (1 - chance) / clips)
    assert (others.mean(dim=0) - chance).abs().max() < six
    easy = ranks < 196 - 73
    of_place = (mask.masked & easy).sum(dim=0) / easy.sum(dim=0)
    assert (of_place - chance).abs().max() < six * math.sqrt(196 / 123)


@pytest.mark.parametrize("name", MODELS)
def test_number_of_parameters_is_the_official_one(name):
    """Theirs includes the fixed positions, and a predictor with one output per pixel value."""
    size, side, ours, official = MODELS[name]
    model = on_meta(name)
    assert count(model) == ours
    assert all(p.requires_grad for p in model.parameters())
    positions = (1 + model.grid.num_tokens) * (size.dim + DECODER.dim)
    head, values = model.difficulty_decoder.head, 3 * side * side
    assert model.patch_values == values
    assert count(head) == DECODER.dim + 1
    assert ours + positions + (values - 1) * count(head) == official


@pytest.mark.parametrize("name", MODELS)
def test_maes_model_is_the_same_without_the_predictor(name):
    with_predictor, without = on_meta(name), on_meta(name, predictor=False)
    names = {name for name, _ in with_predictor.named_parameters()}
    of_predictor = {name for name in names if name.startswith("difficulty_decoder.")}
    assert {name for name, _ in without.named_parameters()} == names - of_predictor
    assert count(with_predictor) - count(without) == count(with_predictor.difficulty_decoder)


def test_number_of_tensors_is_that_of_the_official_file():
    """The file contains both position tables."""
    assert len({*on_meta("B").state_dict(), "pos_embed", "decoder_pos_embed"}) == 354


@pytest.mark.parametrize(("side", "deviation"), [(16, 0.001426), (14, 0.001758)])
def test_the_predictor_starts_as_the_official_head_that_is_averaged(side, deviation):
    """The official head is linear and xavier-uniform; its outputs, one per value, are averaged."""
    values = 3 * side * side
    official = nn.Linear(512, values)
    nn.init.xavier_uniform_(official.weight)
    nn.init.zeros_(official.bias)
    tokens = torch.randn(4, 512)
    folded, bias = official.weight.mean(dim=0), official.bias.mean()
    torch.testing.assert_close(tokens @ folded + bias, official(tokens).mean(dim=1))

    head = make_shallow(side, pixels=2 * side).difficulty_decoder.head
    assert head.weight.shape == (1, 512)
    # 512 draws give a standard deviation to 3 %; four times that is allowed.
    assert folded.std().item() == pytest.approx(deviation, rel=0.125)
    assert head.weight.std().item() == pytest.approx(deviation, rel=0.125)
    assert head.weight.mean().abs() < 4 * deviation / math.sqrt(512)
    assert not head.bias.any()


def test_initial_weights_are_maes():
    """All of them: xavier-uniform matrices, vectors of 0, norms of 1, tokens normal."""
    model = make_shallow()
    left = dict(model.named_parameters())
    del left["difficulty_decoder.head.weight"]  # see the test above
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (left.pop(f"{name}.weight") == 1).all()
            assert not left.pop(f"{name}.bias").any()
        if isinstance(module, nn.Linear | nn.Conv3d) and f"{name}.weight" in left:
            weight = left.pop(f"{name}.weight").flatten(1)  # flattened for the patch embedding
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.999 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01), name
    assert model.blocks[0].attn.qkv.weight.shape == (3 * 768, 768)  # a single matrix
    # The official patch embedding is a convolution whose bias keeps PyTorch's initial values.
    bias = left.pop("patch_embed.proj.bias")
    bound = 1 / math.sqrt(768)
    assert 0.98 * bound < bias.abs().max() <= bound
    for name in ("cls_token", "mask_token"):
        token = left.pop(name)
        error = 1 / math.sqrt(2 * token.numel())
        assert token.std().item() == pytest.approx(0.02, rel=4 * error)
        assert token.mean().abs() < 4 * 0.02 / math.sqrt(token.numel())
        assert token.abs().max() > 0.05  # normal, not truncated
    assert all(name.endswith("bias") for name in left)
    assert any(name.endswith("qkv.bias") for name in left)
    assert not any(bias.any() for bias in left.values())


def test_every_layer_norm_has_maes_eps():
    norms = [m for m in on_meta("B").modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * (12 + 8 + 8) + 3
    assert {norm.eps for norm in norms} == {1e-6}


def test_matrices_and_tokens_decay():
    model = on_meta("B")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = (
        {names[id(p)] for p in group["params"]}
        for group in parameter_groups(model, 0.05, also_decayed=model.decayed_tokens)
    )
    vectors = {name for name in names.values() if name.endswith("bias") or "norm" in name}
    tokens = {"cls_token", "mask_token"}
    matrices = {name for name in names.values() if name.endswith(".weight")} - vectors
    assert kept == vectors
    assert decayed == matrices | tokens


def test_both_decoders_read_the_same_sequence_the_class_token_first():
    model = make_shallow()
    read = []
    for decoder in (model.reconstructor, model.difficulty_decoder):
        decoder.register_forward_pre_hook(lambda _, inputs: read.append(inputs))
    masked = torch.tensor([[True, False, True, True]])
    prediction = model(torch.randn(1, 3, 1, 32, 32), TokenMask.from_masked(masked, 3))
    (sequence, prefix, _), (other, other_prefix, _) = read
    assert sequence is other
    assert sequence.shape == (1, 1 + 4, 512)
    assert prefix == other_prefix == 1
    assert prediction.content.shape == (1, 3, 768)
    assert prediction.difficulty.shape == (1, 3)
