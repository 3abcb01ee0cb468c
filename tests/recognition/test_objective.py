from dataclasses import replace

import pytest
import torch
from geometry import Geometry
from torch.nn import functional as F

from hpm_video.config.choices import TransformerSize
from hpm_video.config.data import AugmentationConfig
from hpm_video.data.batch import ClipBatch
from hpm_video.recognition.objective import Classification, Mixing
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.patches import normalise
from hpm_video.training.ema import MomentumSchedule, make_ema
from hpm_video.training.engine import TorchEngine
from hpm_video.training.metrics import Meter
from hpm_video.training.optim import make_adamw, parameter_groups
from hpm_video.training.progress import Progress

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
MOMENTUM = MomentumSchedule("paper", 0.9, 0.9)
CLIP, PATCH, CLASSES = (2, 16, 16), (2, 8, 8), 4
CPU = torch.device("cpu")


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    size = TransformerSize(16, 2, 2)
    shape = Geometry(TokenGrid.of_clip(CLIP, PATCH), PATCH, size, "sequence")
    return shape.classifier(CLASSES, head_init_scale=1.0, **options)


def batch_of(size=4, files=None):
    draw = torch.Generator().manual_seed(5)
    return ClipBatch(
        torch.randint(256, (size, 3, *CLIP), dtype=torch.uint8, generator=draw),
        keys=torch.arange(size) + 100,
        labels=torch.arange(size) % CLASSES,
        files=files or tuple(f"/v/{i}" for i in range(size)),
        failures=(),
    )


def at(update):
    return Progress(update, 0.0, 10)


def make(label_smoothing=0.0, **options):
    return Classification(mean=MEAN, std=STD, label_smoothing=label_smoothing, **options)


def mixing(**options):
    return Mixing(CLASSES, AugmentationConfig(**options))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_loss_is_the_cross_entropy_with_smoothed_labels(smoothing):
    model, batch = make_model(), batch_of()
    losses = make(smoothing).losses(model, batch, at(0))
    logs = model(normalise(batch.clips, MEAN, STD)).log_softmax(dim=1)
    targets = F.one_hot(batch.labels, CLASSES) * (1 - smoothing) + smoothing / CLASSES
    torch.testing.assert_close(losses.total, -(targets * logs).sum(dim=1).mean())
    assert list(losses.parts) == ["classification"]
    assert losses.parts["classification"] is losses.total


def test_the_model_sees_normalised_clips_and_the_keys():
    seen = {}

    def model(clips, keys):
        seen.update(clips=clips, keys=keys)
        return torch.zeros(4, CLASSES)

    batch = batch_of()
    make().losses(model, batch, at(0))
    pixels = batch.clips.double() / 255
    expected = (pixels - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)
    torch.testing.assert_close(seen["clips"].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(seen["keys"], batch.keys)


class Recorder:
    """A model that records its input, and predicts class i for clip i."""

    def __init__(self):
        self.seen = []

    def __call__(self, clips, keys):
        self.seen.append(clips)
        return torch.eye(CLASSES)


@pytest.mark.parametrize("kind", [{"cutmix": 0.0}, {"mixup": 0.0}])
def test_mixed_clips_go_with_labels_mixed_in_the_same_shares(kind):
    model, batch = Recorder(), batch_of()
    # The smoothing of the objective itself has no effect: mixing makes its own targets.
    objective = make(0.3, mixing=mixing(label_smoothing=0.1, **kind))
    loss = objective.losses(model, batch, at(3)).total
    plain = normalise(batch.clips, MEAN, STD)
    (seen,) = model.seen
    if "mixup" in kind:
        share = 1 - (seen != plain).any(dim=1).float().mean()  # the area outside the box
    else:
        partner = plain.flip(0)
        share = ((seen - partner) * (plain - partner)).sum() / (plain - partner).square().sum()
    assert 0.02 < share < 0.98
    labels = F.one_hot(batch.labels, CLASSES) * 0.9 + 0.1 / CLASSES
    targets = share * labels + (1 - share) * labels.flip(0)
    expected = -(targets * torch.eye(CLASSES).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_what_is_mixed_depends_on_the_seed_the_update_and_the_files_of_a_micro_batch():
    model = Recorder()
    for seed, update, files in (
        (0, 0, "aaaa"),
        (0, 0, "aaaa"),
        (0, 0, "bbbb"),
        (0, 1, "aaaa"),
        (1, 0, "aaaa"),
    ):
        make(mixing=mixing(), seed=seed).losses(model, batch_of(files=tuple(files)), at(update))
    first, again, *others = model.seen
    assert torch.equal(first, again)
    assert all(not torch.equal(first, other) for other in others)


def test_the_loss_is_float32_in_mixed_precision():
    model, batch = make_model(), batch_of()
    for objective in (make(0.1), make(mixing=mixing())):
        with torch.autocast("cpu", torch.bfloat16):
            assert objective.losses(model, batch, at(0)).total.dtype == torch.float32


def test_an_average_follows_the_weights_once_per_update():
    model = make_model()
    average = make_ema(model)
    objective = make(ema=average, momentum=MOMENTUM)
    assert objective.auxiliary_modules == {"average": average}
    start = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for steps in (1, 2):
        objective.after_update(model, at(steps - 1))
        for own, before in zip(average.parameters(), start, strict=True):
            torch.testing.assert_close(own, before + 1 - 0.9**steps, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in average.parameters())


def test_without_an_average_nothing_follows():
    objective, model = make(), make_model()
    assert objective.auxiliary_modules == {}
    objective.after_update(model, at(0))
    assert objective.ema is None
    assert objective.settings(at(0)) == {}


@pytest.mark.parametrize("pooling", ["mean_norm", "batch_norm", "attentive"])
@pytest.mark.parametrize("mixed", [False, True])
def test_it_learns_one_batch_by_heart(pooling, mixed):
    options = {"pooling": pooling, "drop_path": 0.1, "head_dropout": 0.1, "init": "xavier"}
    model, batch = make_model(**options), batch_of()
    objective = make(mixing=mixing(cutmix=0.0, mixup=0.1, label_smoothing=0.0) if mixed else None)
    optimizer = make_adamw(parameter_groups(model, 0.0), betas=(0.9, 0.999))
    engine = TorchEngine(model, optimizer, device=CPU)
    for update in range(80):
        for group in engine.param_groups:
            group["lr"] = 3e-3
        losses = objective.losses(engine, batch, at(update))
        engine.backward(losses.total)
        engine.step()
        objective.after_update(model, at(update))
    model.eval()
    assert model(normalise(batch.clips, MEAN, STD)).argmax(dim=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_in_an_update_waits_for_the_device(mixed):
    """Fake tensors have no values: reading one raises an error."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    mix = mixing() if mixed else None
    with FakeTensorMode():
        # A copy of a fake model would copy its fake mode, so the EMA is built anew.
        model = make_model(drop_path=0.2, head_dropout=0.2)
        objective = make(
            0.1,
            mixing=mix and without_generators(mix),
            ema=make_model().requires_grad_(requires_grad=False),
            momentum=MOMENTUM,
        )
        batch = replace(
            batch_of(),
            clips=torch.empty(4, 3, *CLIP, dtype=torch.uint8),
            keys=torch.empty(4, dtype=torch.int64),
            labels=torch.empty(4, dtype=torch.int64),
        )
        engine = TorchEngine(model, torch.optim.AdamW(model.parameters()), device=CPU)
        meter = Meter(CPU)
        for update in range(2):
            losses = objective.losses(engine, batch, at(update))
            engine.backward(losses.total)
            engine.step()
            objective.after_update(model, at(update))
            meter.add(update, losses, batch.files)
        with pytest.raises(DataDependentOutputException):
            losses.total.item()


def without_generators(mix):
    """Mix without saving torch's generator, whose state is no fake tensor."""

    def mixed(clips, labels, key):
        planes, targets = mix._mixup(clips.flatten(1, 2).clone(), labels)
        return planes.view(clips.shape), targets

    return mixed


def test_a_frozen_model_learns_its_head_alone_through_the_engine():
    model = make_model(pooling="attentive", frozen=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_adamw(parameter_groups(model, 0.05), betas=(0.9, 0.999))
    engine = TorchEngine(model, optimizer, device=CPU, clip_grad=1.0)
    for group in engine.param_groups:
        group["lr"] = 1e-2
    engine.backward(make(0.1).losses(engine, batch_of(), at(0)).total)
    engine.step()
    assert engine.gradient_norm > 0
    changed = {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    assert changed
    assert all(
        name.startswith(("head.", "attn_pool.", "head_norm.", "fc_norm.")) for name in changed
    )
