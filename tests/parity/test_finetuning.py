"""Our classifier and its layer decay against transformers' VideoMAE and timm."""

import pytest
import torch
from geometry import Geometry

from hpm_video.config.choices import TransformerSize
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.patches import normalise
from hpm_video.training.optim import layer_decay_of, parameter_groups

CLIP, PATCH, SIZE, CLASSES = (4, 32, 32), (2, 16, 16), TransformerSize(48, 3, 4), 7
SHAPE = Geometry(TokenGrid.of_clip(CLIP, PATCH), PATCH, SIZE, "sequence")


@pytest.fixture
def theirs():
    videomae = pytest.importorskip("transformers.models.videomae")
    config = videomae.VideoMAEConfig(
        image_size=32,
        num_frames=4,
        hidden_size=SIZE.dim,
        num_hidden_layers=SIZE.depth,
        num_attention_heads=SIZE.num_heads,
        intermediate_size=4 * SIZE.dim,
        layer_norm_eps=1e-6,  # their default is 1e-12
        use_mean_pooling=True,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    model = videomae.VideoMAEForVideoClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.fc_norm.eps = 1e-6  # theirs is fixed at 1e-5; the original has 1e-6
    return model


@pytest.fixture
def ours(theirs, copy_blocks):
    model = SHAPE.classifier(CLASSES).eval()
    trunk = theirs.videomae
    projection = trunk.embeddings.patch_embeddings.projection
    model.patch_embed.proj.load_state_dict(projection.state_dict())
    copy_blocks(model, trunk.encoder.layer)
    model.fc_norm.load_state_dict(theirs.fc_norm.state_dict())
    model.head.load_state_dict(theirs.classifier.state_dict())
    return model


def test_same_logits_weight_for_weight(theirs, ours):
    pixels = torch.randint(256, (3, 3, *CLIP), dtype=torch.uint8)
    clips = normalise(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = theirs(clips.transpose(1, 2)).logits
        logits = ours(clips)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


def test_same_gradients_weight_for_weight(theirs, ours):
    clips = torch.randn(2, 3, *CLIP)
    labels = torch.tensor([1, 4])
    torch.nn.functional.cross_entropy(theirs(clips.transpose(1, 2)).logits, labels).backward()
    torch.nn.functional.cross_entropy(ours(clips), labels).backward()
    last = theirs.videomae.encoder.layer[-1]
    pairs = [
        (ours.head.weight, theirs.classifier.weight),
        (ours.fc_norm.bias, theirs.fc_norm.bias),
        (ours.blocks[-1].mlp.fc2.weight, last.output.dense.weight),
        (
            ours.patch_embed.proj.bias,
            theirs.videomae.embeddings.patch_embeddings.projection.bias,
        ),
    ]
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_same_number_of_parameters_and_no_norm_before_the_mean(theirs, ours):
    assert theirs.videomae.layernorm is None
    count = sum(p.numel() for p in theirs.parameters())
    key_biases = SIZE.depth * SIZE.dim  # they have none
    assert sum(p.numel() for p in ours.parameters()) == count + key_biases


def settings(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["weight_decay"], round(group["lr_scale"], 12))
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize("decay", [0.75, 1.0])
def test_layer_decay_is_timms(decay):
    timm = pytest.importorskip("timm.models.vision_transformer")
    optim = pytest.importorskip("timm.optim")
    model = SHAPE.classifier(CLASSES)
    peer = timm.VisionTransformer(
        img_size=32,
        patch_size=16,
        embed_dim=SIZE.dim,
        depth=SIZE.depth,
        num_heads=SIZE.num_heads,
        num_classes=CLASSES,
        global_pool="avg",
        class_token=False,
        pos_embed="none",
    )
    expected = settings(peer, optim.param_groups_layer_decay(peer, 0.05, layer_decay=decay))
    scale = layer_decay_of(model.layer_of, model.num_layers, decay)
    assert settings(model, parameter_groups(model, 0.05, scale)) == expected
