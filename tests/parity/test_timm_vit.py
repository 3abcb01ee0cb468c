"""Our classifier of images against timm's vision transformer, weight for weight.

Both compute in float64 wherever ours can, so that a difference is not rounding.
"""

import pytest
import torch
import torch.nn.functional as F
from geometry import Geometry
from torch import nn

from hpm_video.config.choices import TransformerSize
from hpm_video.tokens.grid import TokenGrid
from hpm_video.training.optim import layer_decay_of, parameter_groups

timm = pytest.importorskip("timm.models.vision_transformer")
optim = pytest.importorskip("timm.optim")

PATCH, IMAGE, SIZE, CLASSES = 8, (32, 48), TransformerSize(48, 3, 4), 7
KINDS = pytest.mark.parametrize(
    ("class_token", "global_pool", "pooling"),
    [
        (True, "avg", "mean_norm"),
        (True, "token", "class_token"),
        (False, "avg", "mean_norm"),
    ],
)


def in_our_layout(tensors):
    """timm's weights or their gradients: the names are the same, but our positions are fixed."""
    found = {name: tensor for name, tensor in tensors.items() if name != "pos_embed"}
    found["patch_embed.proj.weight"] = found["patch_embed.proj.weight"].unsqueeze(2)
    return found


def make_theirs(class_token, global_pool):
    torch.manual_seed(0)
    model = timm.VisionTransformer(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=SIZE.dim,
        depth=SIZE.depth,
        num_heads=SIZE.num_heads,
        num_classes=CLASSES,
        class_token=class_token,
        global_pool=global_pool,
    ).eval()
    eps = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    assert eps == {1e-6}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def make_ours(class_token, pooling, **options):
    shape = Geometry(
        TokenGrid.of_clip((1, *IMAGE), (1, PATCH, PATCH)),
        (1, PATCH, PATCH),
        SIZE,
        positions="space_time",
        class_token=class_token,
        conventions="mae",
    )
    return shape.classifier(CLASSES, pooling=pooling, **options).eval().double()


@torch.no_grad()
def give_positions(ours, theirs):
    """Copy ours, which are fixed, to timm's, which are learned; a class token has none."""
    table = ours.positions("pos_embed", ours.grid)
    theirs.pos_embed.copy_(F.pad(table, (0, 0, ours.num_prefix, 0)))


def make_pair(class_token, global_pool, pooling):
    """-> our model and timm's, with all weights the same"""
    theirs, ours = make_theirs(class_token, global_pool), make_ours(class_token, pooling)
    ours.load_state_dict(in_our_layout(theirs.state_dict()))
    give_positions(ours, theirs)
    return ours, theirs


def images():
    return torch.randn(4, 3, 1, *IMAGE, dtype=torch.float64)


@torch.no_grad()
@KINDS
def test_same_logits(class_token, global_pool, pooling):
    ours, theirs = make_pair(class_token, global_pool, pooling)
    clips = images()
    expected = theirs(clips.squeeze(2))
    assert expected.std(dim=0).min() > 0.1  # images differ
    torch.testing.assert_close(ours(clips), expected, rtol=0, atol=1e-12)


@KINDS
def test_same_gradient_of_every_parameter(class_token, global_pool, pooling):
    ours, theirs = make_pair(class_token, global_pool, pooling)
    clips, labels = images(), torch.tensor([1, 4, 0, 4])
    F.cross_entropy(theirs(clips.squeeze(2)), labels).backward()
    F.cross_entropy(ours(clips), labels).backward()
    expected = in_our_layout({name: p.grad for name, p in theirs.named_parameters()})
    own = dict(ours.named_parameters())
    assert own.keys() == expected.keys()
    for name, parameter in own.items():
        assert expected[name].abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


def test_linear_probe_is_a_batch_norm_without_weights_and_a_linear_layer():
    """On the class token after timm's last norm. Ours pools in float32."""
    theirs = make_theirs(class_token=True, global_pool="token").float()
    ours = make_ours(class_token=True, pooling="batch_norm", frozen=True).float()
    probe = nn.Sequential(
        nn.BatchNorm1d(SIZE.dim, affine=False, eps=1e-6), nn.Linear(SIZE.dim, CLASSES)
    )
    encoder = in_our_layout(theirs.state_dict())
    encoder |= {f"head.{name}": weight for name, weight in probe[1].state_dict().items()}
    left = ours.load_state_dict(encoder, strict=False)
    assert left.unexpected_keys == []
    assert all(name.startswith("head_norm.") for name in left.missing_keys)
    give_positions(ours, theirs)

    clips, labels = images().float(), torch.tensor([1, 4, 0, 4])
    with torch.no_grad():
        first = theirs.forward_features(clips.squeeze(2))[:, 0]
    ours.train()
    expected, logits = probe(first), ours(clips)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    F.cross_entropy(expected, labels).backward()
    F.cross_entropy(logits, labels).backward()
    learned = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert learned.keys() == {"head.weight", "head.bias"}
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
    for name, gradient in learned.items():
        expected_gradient = probe[1].get_parameter(name.removeprefix("head.")).grad
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)

    for name, running in probe[0].named_buffers():
        torch.testing.assert_close(ours.head_norm.get_buffer(name), running, rtol=0, atol=1e-5)
    later = images().float()
    with torch.no_grad():
        expected = probe.eval()(theirs.forward_features(later.squeeze(2))[:, 0])
        torch.testing.assert_close(ours.eval()(later), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decay", [0.75, 1.0])
@KINDS
def test_weight_decay_and_learning_rate_of_every_parameter(
    class_token, global_pool, pooling, decay
):
    ours, theirs = make_ours(class_token, pooling), make_theirs(class_token, global_pool)
    expected = {}
    names = {id(p): name for name, p in theirs.named_parameters()}
    kept = theirs.no_weight_decay()
    assert "cls_token" in kept
    for group in optim.param_groups_layer_decay(theirs, 0.05, kept, layer_decay=decay):
        for parameter in group["params"]:
            name = names[id(parameter)]
            expected[name] = group["weight_decay"], pytest.approx(group["lr_scale"])
    # timm trains the last norm at the rate of the last block; in MAE's and our fine-tuning
    # everything after the blocks trains at the rate of the head.
    expected |= {name: (0.0, 1.0) for name in expected if name.startswith("norm.")}
    del expected["pos_embed"]

    names = {id(p): name for name, p in ours.named_parameters()}
    scale = layer_decay_of(ours.layer_of, ours.num_layers, decay)
    found = {
        names[id(p)]: (group["weight_decay"], group["lr_scale"])
        for group in parameter_groups(ours, 0.05, scale)
        for p in group["params"]
    }
    assert found == expected
