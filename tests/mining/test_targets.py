"""Reconstruction targets: pixels, features of a model, or features of the teacher."""

import numpy as np
import pytest
import torch
from geometry import Geometry
from torch import nn
from torch.nn import functional as F

from hpm_video.config.choices import TransformerSize
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.batch import ClipBatch
from hpm_video.mining.objective import HardPatchesMining
from hpm_video.mining.study import study_clips
from hpm_video.mining.targets import FeatureTarget, PixelTarget
from hpm_video.mining.validation import measure
from hpm_video.models.from_config import build_student
from hpm_video.runs.pretraining import build_objective
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import STRATEGIES, MaskRule, TokenMask
from hpm_video.tokens.patches import patchify, standardise
from hpm_video.training.ema import MomentumSchedule, make_ema
from hpm_video.training.engine import TorchEngine
from hpm_video.training.optim import make_adamw, parameter_groups
from hpm_video.training.progress import Progress

CLIP, PATCH, WIDTH = (4, 16, 16), (2, 4, 4), 12
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
GRID = TokenGrid.of_clip(CLIP, PATCH)
ENCODER = TransformerSize(32, 2, 4)
CPU = torch.device("cpu")


class Features(nn.Module):
    """A fixed random model that gives one feature per patch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(9)
        self.linear = nn.Linear(3 * 2 * 4 * 4, WIDTH)
        self.calls = 0

    def forward(self, clips):
        self.calls += 1
        return self.linear(patchify(clips.float() / 255 - 0.5, PATCH)).tanh()


def target_of(model):
    return FeatureTarget(PATCH, MEAN, STD, model)


def batch_of(clips=4, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return ClipBatch(
        torch.randint(256, (clips, 3, *CLIP), dtype=torch.uint8, generator=draw),
        keys=torch.arange(clips) + 100,
        labels=torch.full((clips,), -1),
        files=("clip",) * clips,
        failures=(),
    )


def mask_of(clips=4, hidden=24):
    order = torch.rand(clips, GRID.num_tokens, generator=torch.Generator().manual_seed(0))
    masked = order.argsort(dim=1) < hidden
    return TokenMask.from_masked(masked, hidden)


def make(target, strategy="random", predictor="none", class_token=False):
    torch.manual_seed(0)
    shape = Geometry(GRID, PATCH, ENCODER, "sequence", class_token=class_token)
    width = None if isinstance(target, PixelTarget) else WIDTH
    student = shape.autoencoder(
        TransformerSize(16, 1, 2),
        predictor=predictor != "none",
        target_width=ENCODER.dim if target.of_teacher else width,
    )
    objective = HardPatchesMining(
        {"": MaskRule(GRID, "token", 24, STRATEGIES[strategy])},
        target,
        predictor=predictor,
        predictor_weight=1.0,
        ema=make_ema(student) if predictor != "none" or target.of_teacher else None,
        momentum=MomentumSchedule("warmup", 0.0, 0.99),
    )
    optimizer = make_adamw(parameter_groups(student, 0.05), betas=(0.9, 0.95))
    return student, objective, TorchEngine(student, optimizer, device=CPU)


# --- Errors -------------------------------------------------------------------------------------


def test_the_error_of_a_feature_is_2_less_2_cos():
    predicted, features = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    errors = target_of(None).errors(predicted, features)
    assert errors.shape == (3, 5)
    torch.testing.assert_close(errors, 2 - 2 * F.cosine_similarity(predicted, features, dim=-1))
    for factor, error in (1, 0.0), (-1, 4.0):
        same = target_of(None).errors(factor * features, features)
        torch.testing.assert_close(same, torch.full((3, 5), error), rtol=0, atol=1e-5)


def test_neither_side_counts_by_its_length():
    predicted, features = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    scales = torch.rand(2, 3, 5, 1) * 100 + 0.01
    errors = target_of(None).errors(predicted, features)
    scaled = target_of(None).errors(predicted * scales[0], features * scales[1])
    torch.testing.assert_close(scaled, errors, rtol=1e-5, atol=1e-6)


def test_errors_are_float32_in_mixed_precision():
    predicted, features = torch.randn(2, 3, 5, 8).bfloat16()
    for target in (target_of(None), PixelTarget(PATCH, MEAN, STD, "joint")):
        assert target.errors(predicted, features).dtype == torch.float32


def test_the_baseline_is_the_mean_direction_of_the_hidden_tokens_of_a_clip():
    features = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    features = features * torch.rand(2, 6, 1) * 9  # a long feature counts no more than a short one
    target = target_of(None)
    for clip, errors in zip(features, target.baseline_errors(features), strict=True):
        mean = sum(feature / feature.norm() for feature in clip)
        expected = [2 - 2 * (mean @ one / mean.norm() / one.norm()).item() for one in clip]
        assert errors.tolist() == pytest.approx(expected, abs=1e-5)
    alike = torch.ones(2, 6, 8)
    torch.testing.assert_close(target.baseline_errors(alike), torch.zeros(2, 6))


@pytest.mark.parametrize("kind", ["raw", "joint", "per_channel"])
def test_pixel_targets_are_patches_standardised_as_named(kind):
    batch, mask, target = batch_of(), mask_of(), PixelTarget(PATCH, MEAN, STD, kind)
    pixels = batch.clips.double() / 255
    if kind != "per_channel":
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
        pixels = (pixels - mean) / std
    expected = standardise(mask.take_masked(patchify(pixels, PATCH)), kind, channels=3)
    found = target.of(batch.clips, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert target.features(batch.clips) is None
    patches = patchify(batch.clips, PATCH)
    assert torch.equal(target.to_pixels(target.patches(batch.clips)), patches)
    one_off = found + 1
    torch.testing.assert_close(target.errors(one_off, found), torch.ones(4, 24))


# --- Where features come from -------------------------------------------------------------------


def test_features_are_those_of_the_hidden_tokens():
    model, batch, mask = Features(), batch_of(), mask_of()
    target = target_of(model)
    features = target.features(batch.clips)
    found = target.of(batch.clips, mask, features)
    assert torch.equal(found, features[mask.masked].view(4, 24, WIDTH))
    with pytest.raises(ValueError, match="targets are features, and none were computed"):
        target.of(batch.clips, mask)


def test_a_feature_model_gets_no_gradient():
    model = Features()  # by itself it would learn
    student, objective, _ = make(target_of(model))
    objective.losses(student, batch_of(), Progress(0, 0, 1)).total.backward()
    assert not target_of(model).features(batch_of().clips).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert student.patch_embed.proj.weight.grad.abs().sum() > 0


def test_the_student_learns_the_features_of_one_batch_by_heart():
    model = Features()
    student, objective, engine = make(target_of(model), predictor="relative")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch, found = batch_of(2), []
    for update in range(60):
        progress = Progress(update, update / 10, 6)
        for group in engine.param_groups:
            group["lr"] = 3e-3
        losses = objective.losses(engine, batch, progress)
        engine.backward(losses.total)
        engine.step()
        objective.after_update(student, progress)
        found.append(losses.parts["reconstruction"].item())
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.calls == 60


def test_what_is_measured_is_the_error_against_the_mean_direction():
    model = Features()
    student, objective, engine = make(target_of(model), predictor="relative")
    mean = F.normalize(model(batch_of().clips), dim=-1).mean(dim=(0, 1))
    with torch.no_grad():
        student.reconstructor.head.weight.zero_()
        student.reconstructor.head.bias.copy_(mean)
    model.calls = 0
    measures = measure(objective, engine, [batch_of()])
    # The mean over all clips is close to that of each, which is the best constant answer.
    assert 1 < measures["relative_error"] < 1.1
    assert {"student_ranking", "teacher_ranking", "ranking_by_variance"} <= set(measures)
    assert model.calls == 1, "features do not depend on the mask"


def test_a_study_of_features_has_no_reconstruction():
    student, objective, _ = make(target_of(Features()), predictor="relative")
    (study, _) = study_clips(objective, student, batch_of(2), num_masks=2)
    assert study.reconstruction is None
    assert (study.target, study.statistics) == (None, "none")
    assert 0 <= np.nanmin(study.true_error) <= np.nanmax(study.true_error) <= 4


# --- The teacher's own features -----------------------------------------------------------------


def encoded_by(teacher):
    """A list to which each call of its encoder appends the output."""
    seen = []
    teacher.norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    return seen


@pytest.mark.parametrize(
    ("strategy", "predictor", "epoch"),
    [
        ("random", "none", 0),
        ("random", "relative", 0),
        ("hardest", "relative", 0),
        ("easy_to_hard", "absolute", 9),
    ],
)
def test_the_teacher_encodes_once_per_update_whatever_is_asked_of_it(strategy, predictor, epoch):
    student, objective, _ = make(target_of(None), strategy, predictor)
    objective.ema.reconstructor.register_forward_hook(lambda *_: pytest.fail("ran"))
    seen = encoded_by(objective.ema)
    objective.losses(student, batch_of(), Progress(0, epoch, 10)).total.backward()
    assert len(seen) == 1
    assert seen[0].shape == (4, GRID.num_tokens, ENCODER.dim)
    assert not seen[0].requires_grad
    assert all(parameter.grad is None for parameter in objective.ema.parameters())


def test_pixels_need_the_teacher_only_where_it_picks():
    for strategy, calls in ("random", 0), ("hardest", 1):
        target = PixelTarget(PATCH, MEAN, STD, "raw")
        student, objective, _ = make(target, strategy, "relative")
        seen = encoded_by(objective.ema)
        objective.losses(student, batch_of(), Progress(0, 0, 10))
        assert len(seen) == calls


@pytest.mark.parametrize("class_token", [False, True])
def test_the_target_is_what_the_teachers_encoder_makes_of_the_whole_clip(class_token):
    student, objective, _ = make(target_of(None), class_token=class_token)
    with torch.no_grad():
        objective.ema.patch_embed.proj.weight.mul_(2)  # no longer equal to the student's
    batch, asked = batch_of(), []

    def knows_all(clips, mask, keys):
        tokens = objective.ema.encode(clips)[:, int(class_token) :]
        asked.append(mask)
        return student(clips, mask)._replace(content=5 * mask.take_masked(tokens))

    losses = objective.losses(knows_all, batch, Progress(0, 0, 1))
    assert losses.total.item() == pytest.approx(0, abs=1e-5)
    assert asked[0].masked.sum(dim=1).tolist() == [24] * 4
    assert objective.losses(student, batch, Progress(0, 0, 1)).total > 0.1


def test_a_validation_batch_is_encoded_once_for_all_masks():
    student, objective, _ = make(target_of(None), predictor="relative")
    seen = encoded_by(objective.ema)
    found = objective.evaluate(student, batch_of(), ["a", "b", "c"])
    assert len(found) == 3
    assert len(seen) == 1
    assert not torch.equal(found[0].mask.masked, found[1].mask.masked)
    for one in found:
        assert one.errors.shape == one.baseline_errors.shape == (4, 24)


def test_a_teacher_is_there_without_a_predictor_where_it_is_the_target():
    student, objective, _ = make(target_of(None))
    assert list(objective.auxiliary_modules) == ["teacher"]
    assert objective.settings(Progress(0, 0, 1)).keys() == {"hard_fraction", "momentum"}
    assert objective.difficulty(batch_of()) is None
    assert list(objective.losses(student, batch_of(), Progress(0, 0, 1)).parts) == [
        "reconstruction"
    ]
    with torch.no_grad():
        student.mask_token.fill_(1)
    objective.after_update(student, Progress(0, 0, 1))
    assert objective.ema.mask_token.max() > 0.8, (
        "it follows the student, at first with momentum 0.1"
    )


@pytest.mark.parametrize(
    ("target", "width", "has_teacher"), [("ema", 32, True), ("joint", 3 * 2 * 4 * 4, False)]
)
def test_a_config_says_what_is_reconstructed(tmp_path, target, width, has_teacher):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
        model:
          encoder: {{dim: 32, depth: 1, num_heads: 2}}
          decoder: {{dim: 16, depth: 1, num_heads: 2}}
          patch_size: [2, 4, 4]
        data: {{num_frames: 4, frame_size: [16, 16], mean: [0.4, 0.5, 0.6]}}
        masking: {{strategy: random}}
        mining: {{predictor: none, target: {target}}}
        """
    )
    config = load_config(PretrainConfig, path, [])
    student = build_student(config)
    teacher = make_ema(student) if has_teacher else None
    objective = build_objective(config, teacher, CPU)
    goal = objective.target
    assert student.reconstructor.head.out_features == width
    assert goal.of_teacher == config.mining.has_teacher == has_teacher
    assert (goal.patch_size, goal.mean) == (PATCH, MEAN)
    losses = objective.losses(student, batch_of(), Progress(0, 0, 1))
    assert losses.total > 0
