import math
from dataclasses import replace

import pytest
import torch
from geometry import Geometry, score_all
from torch import nn

from hpm_video.config.choices import TransformerSize
from hpm_video.models.positions import position_table
from hpm_video.tokens.grid import TokenGrid
from hpm_video.training.optim import OPTIMIZERS, layer_decay_of, parameter_groups

CLIP, PATCH, SIZE, CLASSES = (4, 32, 32), (2, 16, 16), TransformerSize(32, 3, 4), 5
GRID = TokenGrid.of_clip(CLIP, PATCH)
SHAPE = Geometry(GRID, PATCH, SIZE, "sequence")
POOLINGS = ["mean_norm", "batch_norm", "attentive"]
OF_ENCODER = ("blocks.", "norm.", "patch_embed.")
SIZES = {
    "S": TransformerSize(384, 12, 6),
    "B": TransformerSize(768, 12, 12),
    "L": TransformerSize(1024, 24, 16),
    "H": TransformerSize(1280, 32, 16),
}


def make(seed=0, shape=SHAPE, **options):
    torch.manual_seed(seed)
    return shape.classifier(CLASSES, **({"head_init_scale": 1.0} | options))


def clips_of(batch=4, clip=CLIP, seed=1):
    return torch.randn(batch, 3, *clip, generator=torch.Generator().manual_seed(seed))


def keys_of(batch=4):
    return torch.arange(batch) + 100


@pytest.mark.parametrize(
    ("pooling", "frozen"),
    [*((pooling, False) for pooling in POOLINGS), ("batch_norm", True), ("attentive", True)],
)
def test_every_pooling_gives_logits_and_gradients_to_what_learns(pooling, frozen):
    model = make(pooling=pooling, frozen=frozen)
    logits = model(clips_of(), keys_of())
    assert logits.shape == (4, CLASSES)
    assert logits.dtype == torch.float32
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    everything = {name for name, _ in model.named_parameters()}
    of_encoder = {name for name in everything if name.startswith(OF_ENCODER)}
    assert with_gradient == (everything - of_encoder if frozen else everything)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_norm_of_the_encoder_is_there_unless_one_follows_the_mean(pooling):
    names = [name for name, _ in make(pooling=pooling).named_parameters()]
    assert ("norm.weight" in names) == (pooling != "mean_norm")
    assert ("fc_norm.weight" in names) == (pooling == "mean_norm")


def test_pooling_is_the_norm_of_the_mean_of_all_tokens():
    model = make()
    nn.init.normal_(model.fc_norm.weight)
    nn.init.normal_(model.fc_norm.bias)
    tokens = torch.randn(3, 8, 32)
    mean = tokens.mean(dim=1)
    centred = mean - mean.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    expected = normed * model.fc_norm.weight + model.fc_norm.bias
    torch.testing.assert_close(model.pool(tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters_is_that_of_a_plain_transformer(name):
    size, width = SIZES[name], SIZES[name].dim
    grid = TokenGrid.of_clip((16, 224, 224), (2, 16, 16))
    with torch.device("meta"):
        model = Geometry(grid, (2, 16, 16), size, "sequence").classifier(400)
    patches = (2 * 16 * 16 * 3 + 1) * width
    attention = 4 * width**2 + 4 * width
    mlp = 8 * width**2 + 5 * width
    blocks = size.depth * (attention + mlp + 4 * width)
    count = patches + blocks + 2 * width + 400 * (width + 1)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("init", ["truncated_normal", "xavier"])
def test_it_builds_without_memory(pooling, init):
    with torch.device("meta"):
        model = make(pooling=pooling, init=init)
        logits = model(torch.empty(2, 3, *CLIP), torch.empty(2, dtype=torch.int64))
    assert logits.shape == (2, CLASSES)
    assert logits.is_meta


# --- Starting weights ---------------------------------------------------------------------------


def test_a_head_starts_scaled_and_everything_else_the_same():
    small, plain = make(head_init_scale=0.001), make(head_init_scale=1.0)
    torch.testing.assert_close(small.head.weight, 0.001 * plain.head.weight)
    assert small.head.weight.abs().max() > 0
    assert not small.head.bias.any()
    for name, value in plain.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(small.state_dict()[name], value)
    assert small(clips_of()).abs().max() < 0.01


def test_linear_layers_start_as_the_config_says():
    wide = Geometry(GRID, PATCH, TransformerSize(128, 2, 4), "sequence")
    for init, of_width in (
        ("truncated_normal", lambda rows, columns: 0.02),
        ("xavier", lambda rows, columns: math.sqrt(2 / (rows + columns))),
    ):
        model = make(shape=wide, init=init, pooling="attentive")
        linear = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and name != "head"
        }
        assert any(name.startswith("attn_pool.") for name in linear)
        for module in linear.values():
            deviation = module.weight.std().item()
            assert deviation == pytest.approx(of_width(*module.weight.shape), rel=0.05)
            assert module.bias is None or not module.bias.any()


# --- Keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"head_dropout": 0.5}, {"drop_path": 0.6}])
def test_what_is_dropped_depends_on_the_keys_alone(options):
    model, clips, keys = make(**options), clips_of(), keys_of()
    together = model(clips, keys)
    assert torch.equal(model(clips, keys), together)
    torch.testing.assert_close(model(clips[2:3], keys[2:3]), together[2:3])
    others = model(clips, keys + 7)
    assert not torch.allclose(others, together)
    assert not torch.allclose(model(clips), together)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(clips[order], keys[order]), together[order])


@pytest.mark.parametrize("training", [False, True])
def test_without_keys_nothing_is_dropped(training):
    dropping = make(head_dropout=0.5, drop_path=0.6).train(training)
    plain = make().train(training)
    assert torch.equal(dropping(clips_of()), plain(clips_of()))
    assert torch.equal(plain(clips_of(), keys_of()), plain(clips_of()))


def test_head_dropout_zeroes_that_share_and_keeps_the_mean():
    model = make(head_dropout=0.25)
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    clips = clips_of(1).expand(500, -1, -1, -1, -1)
    with torch.no_grad():
        model(clips, torch.arange(500))
        model(clips[:1])
    dropped, plain = seen
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (plain.expand(500, -1) / 0.75)[kept])


def test_a_frozen_encoder_drops_nothing():
    frozen = make(pooling="attentive", frozen=True, drop_path=0.6)
    assert torch.equal(frozen(clips_of(), keys_of()), frozen(clips_of()))


# --- Batch norm ---------------------------------------------------------------------------------


def test_statistics_of_the_batch_in_training_and_running_ones_otherwise():
    model = make(pooling="batch_norm", frozen=True)
    clips = clips_of(8)
    statistics = {name: value.clone() for name, value in model.head_norm.state_dict().items()}
    model.eval()
    model(clips, keys_of(8))
    for name, value in model.head_norm.state_dict().items():
        assert torch.equal(value, statistics[name]), "evaluation leaves them alone"
    alone = model(clips[:1])
    torch.testing.assert_close(alone, model(clips)[:1], rtol=1e-4, atol=1e-5)
    model.train()
    model(clips, keys_of(8))
    mean = model.encode(clips).mean(dim=1)
    updated = model.head_norm
    torch.testing.assert_close(updated.running_mean, 0.1 * mean.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert updated.num_batches_tracked == 1


def test_batch_norm_standardises_each_value_without_weights_of_its_own():
    model = make(pooling="batch_norm")
    assert not list(model.head_norm.parameters())
    tokens = 5 + 3 * torch.randn(64, 6, 32)
    pooled = model.pool(tokens)
    torch.testing.assert_close(pooled.mean(dim=0), torch.zeros(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        pooled.std(dim=0, correction=0), torch.ones(32), rtol=1e-4, atol=1e-4
    )
    assert model.pool(tokens.bfloat16()).dtype == torch.float32


# --- The class token ----------------------------------------------------------------------------

WITH_TOKEN = replace(SHAPE, class_token=True)


@pytest.mark.parametrize(
    ("pooling", "frozen"),
    [
        *((pooling, False) for pooling in (*POOLINGS, "class_token")),
        *((pooling, True) for pooling in ("batch_norm", "attentive", "class_token")),
    ],
)
def test_every_pooling_goes_with_a_class_token(pooling, frozen):
    model = make(shape=WITH_TOKEN, pooling=pooling, frozen=frozen)
    model(clips_of(), keys_of()).square().sum().backward()
    assert (model.cls_token.grad is None) == frozen
    if not frozen:
        assert model.cls_token.grad.abs().sum() > 0
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ("cls_token" in learning) != frozen
    assert model.layer_of("cls_token") == 0


def test_what_each_pooling_takes_of_class_token_and_others():
    tokens = torch.randn(6, 1 + 8, 32)
    other_token = torch.cat([torch.randn(6, 1, 32), tokens[:, 1:]], dim=1)
    other_rest = torch.cat([tokens[:, :1], torch.randn(6, 8, 32)], dim=1)
    for pooling, of_token, of_rest in (
        ("class_token", True, False),
        ("batch_norm", True, False),
        ("mean_norm", False, True),
        ("attentive", True, True),
    ):
        model = make(shape=WITH_TOKEN, pooling=pooling).eval()
        pooled = model.pool(tokens)
        assert torch.equal(model.pool(other_token), pooled) != of_token
        assert torch.equal(model.pool(other_rest), pooled) != of_rest


def test_the_class_token_itself_is_what_the_head_sees():
    model = make(shape=WITH_TOKEN, pooling="class_token")
    expected = model.head(model.encode(clips_of())[:, 0])
    assert torch.equal(model(clips_of()), expected)
    assert isinstance(model.norm, nn.LayerNorm)
    learning = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert learning == {"patch_embed", "cls_token", "blocks", "norm", "head"}


def test_pooling_by_class_token_needs_one():
    with pytest.raises(ValueError, match="needs model.class_token=true"):
        make(pooling="class_token")


# --- The optimizer's groups ---------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
def test_layers_count_from_the_patch_embedding_to_the_head(pooling):
    model = make(pooling=pooling)
    assert model.num_layers == SIZE.depth + 2
    assert model.layer_of("patch_embed.proj.weight") == model.layer_of("patch_embed.proj.bias") == 0
    for block in range(SIZE.depth):
        assert model.layer_of(f"blocks.{block}.attn.qkv.bias") == block + 1
    above = [
        name
        for name, _ in model.named_parameters()
        if name.startswith(("head.", "fc_norm.", "attn_pool.", "norm."))
    ]
    assert above
    assert {model.layer_of(name) for name in above} == {SIZE.depth + 1}


def test_block_10_is_not_block_1():
    with torch.device("meta"):
        model = make(shape=Geometry(GRID, PATCH, TransformerSize(8, 12, 2), "sequence"))
    assert model.layer_of("blocks.1.norm1.weight") == 2
    assert model.layer_of("blocks.10.norm1.weight") == 11
    assert model.layer_of("head.weight") == 13


def test_shares_of_the_learning_rate_and_weight_decay():
    model = make(pooling="attentive")
    groups = parameter_groups(model, 0.05, layer_decay_of(model.layer_of, model.num_layers, 0.75))
    place = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = place[id(parameter)]
        assert group["weight_decay"] == (0.05 if parameter.ndim in (2, 5) else 0)
        if name.startswith("patch_embed."):
            layer = 0
        elif name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        else:
            layer = 4
        assert group["lr_scale"] == pytest.approx(0.75 ** (4 - layer))
    assert len({(g["weight_decay"], g["lr_scale"]) for g in groups}) == len(groups) == 10


def test_without_layer_decay_there_are_two_groups():
    model = make()
    for scale in (None, layer_decay_of(model.layer_of, model.num_layers, 1.0)):
        decayed, kept = parameter_groups(model, 0.05, scale)
        assert (decayed["lr_scale"], kept["lr_scale"]) == (1, 1)
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0)


@pytest.mark.parametrize(
    ("pooling", "learning"), [("batch_norm", {"head"}), ("attentive", {"head", "attn_pool"})]
)
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values())
def test_only_what_follows_a_frozen_encoder_learns(pooling, learning, make_optimizer):
    model = make(pooling=pooling, frozen=True)
    groups = parameter_groups(model, 0.05, layer_decay_of(model.layer_of, model.num_layers, 0.5))
    names = {id(p): name for name, p in model.named_parameters()}
    of_groups = {names[id(p)] for group in groups for p in group["params"]}
    assert of_groups == {name for name in names.values() if name.split(".")[0] in learning}
    optimizer = make_optimizer(groups, betas=(0.9, 0.999))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = {name: value.clone() for name, value in model.named_parameters()}
    nn.functional.cross_entropy(model(clips_of(), keys_of()), torch.arange(4)).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"head.weight"} <= changed <= of_groups
    assert {name.split(".")[0] for name in changed} == learning


# --- The encoder --------------------------------------------------------------------------------


def test_an_encoder_gives_the_tokens_of_the_autoencoder_it_came_from():
    torch.manual_seed(3)
    source = SHAPE.autoencoder(TransformerSize(16, 1, 2))
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.2)
    encoder = SHAPE.encoder()
    missing, _ = encoder.load_state_dict(source.state_dict(), strict=False)
    assert not missing
    clips = clips_of(2)
    seen = []
    source.norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    score_all(source, clips)
    torch.testing.assert_close(encoder.encode(clips), seen[0])
    torch.testing.assert_close(encoder.pool(seen[0]), seen[0].mean(dim=1))


@pytest.mark.parametrize("positions", ["sequence", "space_time"])
def test_positions_are_placed_in_the_grid_of_pretraining(positions):
    source = TokenGrid(1, 3, 3)
    encoder = Geometry(GRID, PATCH, SIZE, positions, source).encoder()
    table = position_table(GRID, SIZE.dim, positions, source)
    assert torch.equal(encoder.positions("pos_embed", GRID), table)
    assert not torch.equal(table, position_table(GRID, SIZE.dim, positions))
    assert not [name for name in encoder.state_dict() if "pos" in name]


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = make(checkpoint_activations=recompute, drop_path=0.5)
        model(clips_of(), keys_of()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize(
    ("clip", "patch", "channels"),
    [((6, 24, 40), (3, 8, 8), 3), ((1, 32, 48), (1, 16, 16), 3), ((2, 16, 16), (1, 8, 8), 5)],
)
def test_any_shape_that_patches_divide(clip, patch, channels):
    shape = Geometry(TokenGrid.of_clip(clip, patch), patch, SIZE, "space_time", channels=channels)
    assert make(shape=shape)(torch.rand(2, channels, *clip)).shape == (2, CLASSES)
