"""Our autoencoder against the independent VideoMAE in transformers, weight for weight."""

import pytest
import torch
from geometry import Geometry

from hpm_video.config.choices import TransformerSize
from hpm_video.mining.losses import reconstruction_errors
from hpm_video.models.masked_autoencoder import MaskedAutoencoder
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import TokenMask, choose_masked, units_to_tokens
from hpm_video.tokens.patches import normalise, patchify, standardise

videomae = pytest.importorskip("transformers.models.videomae")

CLIP, PATCH = (4, 32, 32), (2, 16, 16)
ENCODER, DECODER = TransformerSize(48, 2, 4), TransformerSize(24, 2, 2)
GRID = TokenGrid.of_clip(CLIP, PATCH)
SHAPE = Geometry(GRID, PATCH, ENCODER, "sequence")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def theirs():
    config = videomae.VideoMAEConfig(
        image_size=32,
        num_frames=4,
        hidden_size=ENCODER.dim,
        num_hidden_layers=ENCODER.depth,
        num_attention_heads=ENCODER.num_heads,
        intermediate_size=4 * ENCODER.dim,
        decoder_hidden_size=DECODER.dim,
        decoder_num_hidden_layers=DECODER.depth,
        decoder_num_attention_heads=DECODER.num_heads,
        decoder_intermediate_size=4 * DECODER.dim,
        layer_norm_eps=1e-6,  # their default is 1e-12
        use_mean_pooling=False,
    )
    torch.manual_seed(0)
    model = videomae.VideoMAEForPreTraining(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.decoder.norm.eps = 1e-6  # theirs is fixed at 1e-5
    return model


@pytest.fixture
def ours(theirs, copy_blocks) -> MaskedAutoencoder:
    """Our model with their weights."""
    model = SHAPE.autoencoder(DECODER).eval()
    trunk, decoder = theirs.videomae, theirs.decoder
    copy_blocks(model, trunk.encoder.layer)
    copy_blocks(model.reconstructor, decoder.decoder_layers)
    pairs = [
        (model.patch_embed.proj, trunk.embeddings.patch_embeddings.projection),
        (model.norm, trunk.layernorm),
        (model.reconstructor.norm, decoder.norm),
        (model.reconstructor.head, decoder.head),
        (model.decoder_embed, theirs.encoder_to_decoder),
    ]
    for own, other in pairs:
        own.load_state_dict(other.state_dict())
    model.mask_token.data.copy_(theirs.mask_token.data)
    return model


@torch.no_grad()
@pytest.mark.parametrize("per_channel", [True, False])
def test_same_pixels_and_same_loss_for_the_hidden_tokens(theirs, ours, per_channel):
    theirs.config.norm_pix_loss = per_channel
    pixels = torch.randint(256, (2, 3, *CLIP), dtype=torch.uint8)
    clips = normalise(pixels, MEAN, STD)
    units = choose_masked(None, torch.rand(2, GRID.tokens_per_step), 3, num_hardest=0)
    masked = units_to_tokens(units, GRID, "tube")
    mask = TokenMask.from_masked(masked, num_masked=3 * GRID.time)

    expected = theirs(clips.transpose(1, 2), bool_masked_pos=masked)
    predicted = ours(clips, mask).content
    torch.testing.assert_close(predicted, expected.logits, rtol=1e-5, atol=1e-5)

    # Without standardisation theirs predicts pixels in [0, 1], a target that ours does not have.
    patches = mask.take_masked(patchify(pixels.float() / 255, PATCH))
    target = standardise(patches, "per_channel" if per_channel else "raw", channels=3)
    loss = reconstruction_errors(predicted, target).mean()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_same_number_of_parameters(theirs):
    ours = SHAPE.autoencoder(DECODER, predictor=False)
    count = sum(p.numel() for p in theirs.parameters())
    key_biases = sum(size.depth * size.dim for size in (ENCODER, DECODER))  # they have none
    assert sum(p.numel() for p in ours.parameters()) == count + key_biases
