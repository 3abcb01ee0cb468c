"""Our autoencoder of images against the independent ViTMAE in transformers, weight for weight.

Both compute in float64, so that a difference is not rounding: predictions agree to 1e-12 (seen:
3e-15). Only our targets and losses, and so the gradients, are in float32.
"""

import pytest
import torch
from geometry import Geometry

from hpm_video.config.choices import TransformerSize
from hpm_video.mining.targets import PixelTarget
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import STRATEGIES, MaskRule, count_masked
from hpm_video.tokens.patches import normalise

vitmae = pytest.importorskip("transformers.models.vit_mae")

PATCH, SQUARE, RATIO = 8, (4, 4), 0.75  # pixels; rows and columns of tokens; hidden share
ENCODER, DECODER = TransformerSize(48, 3, 4), TransformerSize(24, 2, 2)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

OLDER_NAMES = {  # of transformers 4 -> of transformers 5
    "vit.encoder.layer.": "vit.layers.",
    "attention.attention.query.": "attention.q_proj.",
    "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
NAMES = {  # of transformers 5 -> ours
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "vit.layers.": "blocks.",
    "vit.layernorm.": "norm.",
    "decoder.decoder_embed.": "decoder_embed.",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_layers.": "reconstructor.blocks.",
    "decoder.decoder_norm.": "reconstructor.norm.",
    "decoder.decoder_pred.": "reconstructor.head.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "attention.o_proj.": "attn.proj.",
}


def by_our_names(tensors):
    """Their learned weights, or gradients, by our names and in our layout."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in (OLDER_NAMES | NAMES).items():
            name = name.replace(theirs, ours)
        found[name] = tensor.unsqueeze(2) if name == "patch_embed.proj.weight" else tensor
    for name in [name for name in found if "q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        found[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return found


def learned(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_theirs(side=SQUARE[0]):
    """A square model with MAE's positions and large weights."""
    config = vitmae.ViTMAEConfig(
        image_size=PATCH * side,
        patch_size=PATCH,
        mask_ratio=RATIO,
        hidden_size=ENCODER.dim,
        num_hidden_layers=ENCODER.depth,
        num_attention_heads=ENCODER.num_heads,
        intermediate_size=4 * ENCODER.dim,
        decoder_hidden_size=DECODER.dim,
        decoder_num_hidden_layers=DECODER.depth,
        decoder_num_attention_heads=DECODER.num_heads,
        decoder_intermediate_size=4 * DECODER.dim,
        layer_norm_eps=1e-6,  # their default is 1e-12
    )
    torch.manual_seed(0)
    model = vitmae.ViTMAEForPreTraining(config).eval()
    # In a model that is not read from a file positions stay 0: in transformers 5 both
    # tables, in transformers 4 the decoder's.
    model.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(side * side)
    with torch.no_grad():
        for parameter in learned(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def make_ours(grid):
    shape = Geometry(
        TokenGrid(1, *grid),
        (1, PATCH, PATCH),
        ENCODER,
        positions="space_time",
        class_token=True,
        conventions="mae",
    )
    return shape.autoencoder(DECODER, predictor=False).eval().double()


@pytest.fixture
def theirs():
    return make_theirs()


@pytest.fixture
def ours(theirs):
    """Our model with all of their weights."""
    model = make_ours(SQUARE)
    model.load_state_dict(by_our_names(learned(theirs)))
    return model


def images(grid=SQUARE, batch=3):
    """-> images as stored (uint8), and as both models see them

    The last one is plain and nearly the mean colour, so that the term added to variances matters.
    """
    generator = torch.Generator().manual_seed(1)
    size = (batch, 3, 1, PATCH * grid[0], PATCH * grid[1])
    pixels = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    pixels[-1] = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1, 1)
    return pixels, normalise(pixels, MEAN, STD).double()


def mask_by(noise, grid=SQUARE):
    count = count_masked(noise.shape[1], RATIO, "hpm")
    rule = MaskRule(TokenGrid(1, *grid), "token", count, STRATEGIES["random"])
    return rule.draw(None, noise, num_picked=0)


def compare(ours, theirs, grid, kind, **options):
    """Compare masks, targets, predictions and losses. -> both losses"""
    theirs.config.norm_pix_loss = kind == "joint"
    pixels, clips = images(grid)
    noise = torch.rand(3, grid[0] * grid[1], generator=torch.Generator().manual_seed(2))
    expected = theirs(clips.squeeze(2), noise=noise, **options)
    mask = mask_by(noise, grid)
    assert torch.equal(mask.masked, expected.mask.bool())

    content = ours(clips, mask).content
    predicted = mask.take_masked(expected.logits)
    assert predicted.std() > 0.5
    torch.testing.assert_close(content, predicted, rtol=0, atol=1e-12)

    target = PixelTarget((1, PATCH, PATCH), MEAN, STD, kind)
    loss = target.errors(content, target.of(pixels, mask)).mean()  # in float32
    torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-6, atol=0)
    return loss, expected.loss


def test_same_positions_and_none_for_the_class_token(theirs, ours):
    grid = TokenGrid(1, *SQUARE)
    for table, expected in (
        (ours.positions("pos_embed", grid), theirs.vit.embeddings.position_embeddings[0]),
        (ours.positions("decoder_pos_embed", grid), theirs.decoder.decoder_pos_embed[0]),
    ):
        torch.testing.assert_close(table, expected[1:], rtol=0, atol=0)
        assert table.std() > 0.3
        assert not expected[0].any()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["raw", "joint"])
def test_same_mask_predictions_and_loss(theirs, ours, kind):
    compare(ours, theirs, SQUARE, kind)


@pytest.mark.parametrize("kind", ["raw", "joint"])
def test_same_targets(theirs, kind):
    """Theirs follow from the slope of their loss: 2 (predicted - target) / (hidden values)."""
    theirs.config.norm_pix_loss = kind == "joint"
    pixels, clips = images()
    noise = torch.rand(3, 16)
    answer = theirs(clips.squeeze(2), noise=noise)
    (slope,) = torch.autograd.grad(answer.loss, answer.logits)
    hidden = answer.mask.bool()
    expected = answer.logits - slope * (slope[hidden].numel() / 2)

    mask = mask_by(noise)
    target = PixelTarget((1, PATCH, PATCH), MEAN, STD, kind).of(pixels, mask)
    expected = mask.take_masked(expected)
    torch.testing.assert_close(target.double(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_same_tokens_of_a_whole_image(theirs, ours):
    """The teacher, probes and features use them; the class token comes first."""
    theirs.config.mask_ratio = 0.0
    _, clips = images()
    in_order = torch.linspace(0, 1, 16).expand(3, -1)
    expected = theirs.vit(clips.squeeze(2), noise=in_order).last_hidden_state
    tokens = ours.encode(clips)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-12)
    assert torch.equal(ours.pool(tokens), tokens[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("grid", [(2, 8), (8, 2)])
@pytest.mark.parametrize("kind", ["raw", "joint"])
def test_rectangular_images(theirs, monkeypatch, grid, kind):
    """Theirs would resize its table to a rectangle; here it gets the corner of a larger table.

    MAE's code of a row or column depends only on its index, so that corner is the table of the
    rectangle.
    """
    rows, columns = grid
    larger, ours = make_theirs(side=8), make_ours(grid)
    ours.load_state_dict(by_our_names(learned(theirs)))
    tables = []
    for positions in (larger.vit.embeddings.position_embeddings, larger.decoder.decoder_pos_embed):
        square = positions[0, 1:].view(8, 8, -1)
        corner = square[:rows, :columns].flatten(0, 1)
        tables.append(torch.cat([positions[:, :1], corner.unsqueeze(0)], dim=1))
    for name, table in zip(("pos_embed", "decoder_pos_embed"), tables, strict=True):
        own = ours.positions(name, TokenGrid(1, *grid))
        torch.testing.assert_close(own, table[0, 1:], rtol=0, atol=0)
    monkeypatch.setattr(theirs.vit.embeddings, "interpolate_pos_encoding", lambda *_: tables[0])
    monkeypatch.setattr(theirs.decoder, "interpolate_pos_encoding", lambda *_: tables[1])
    compare(ours, theirs, grid, kind, interpolate_pos_encoding=True)


@pytest.mark.parametrize("kind", ["raw", "joint"])
def test_same_gradient_of_every_parameter(theirs, ours, kind):
    for loss in compare(ours, theirs, SQUARE, kind):
        loss.backward()
    expected = by_our_names({name: p.grad for name, p in learned(theirs).items()})
    own = dict(ours.named_parameters())
    assert own.keys() == expected.keys()
    for name, parameter in own.items():
        largest = expected[name].abs().max().item()
        assert largest > 1e-5, name
        atol = 1e-6 * max(largest, 1e-5)
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize("size", [(768, 12, 12, 16), (1024, 24, 16, 16), (1280, 32, 16, 14)])
def test_same_number_of_parameters_at_the_sizes_of_the_paper(size):
    dim, depth, heads, side = size
    shape = Geometry(
        TokenGrid(1, 224 // side, 224 // side),
        (1, side, side),
        TransformerSize(dim, depth, heads),
        positions="space_time",
        class_token=True,
        conventions="mae",
    )
    config = vitmae.ViTMAEConfig(
        patch_size=side,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
    )
    with torch.device("meta"):
        model = shape.autoencoder(TransformerSize(512, 8, 16), predictor=False)
        theirs = vitmae.ViTMAEForPreTraining(config)
    counts = [sum(p.numel() for p in learned(m).values()) for m in (model, theirs)]
    assert counts[0] == counts[1]
    weights = {name: p.shape for name, p in by_our_names(learned(theirs)).items()}
    assert {name: p.shape for name, p in model.named_parameters()} == weights
