import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from geometry import Geometry

import hpm_video
from hpm_video.config.choices import TransformerSize
from hpm_video.data.batch import ClipBatch
from hpm_video.mining.objective import HardPatchesMining, named
from hpm_video.mining.targets import FeatureTarget, PixelTarget
from hpm_video.mining.validation import measure, measure_levers, trivial_difficulties
from hpm_video.models.masked_autoencoder import Prediction
from hpm_video.runs.pretraining import describe_sources
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import STRATEGIES, MaskRule
from hpm_video.training.ema import MomentumSchedule, make_ema
from hpm_video.training.engine import TorchEngine
from hpm_video.training.metrics import Meter
from hpm_video.training.optim import make_adamw, parameter_groups
from hpm_video.training.progress import Progress

SHAPES = {"video": ((4, 32, 32), (2, 8, 8)), "image": ((1, 48, 32), (1, 8, 8))}
CPU = torch.device("cpu")
FIRST = Progress(0, 0, 1)


def batch_of(clips):
    return ClipBatch(
        clips,
        keys=torch.arange(len(clips)) + 100,
        labels=torch.full((len(clips),), -1),
        files=("clip",) * len(clips),
        failures=(),
    )


def random_batch(clip_size, batch=4):
    generator = torch.Generator().manual_seed(3)
    shape = (batch, 3, *clip_size)
    return batch_of(torch.randint(256, shape, dtype=torch.uint8, generator=generator))


def make_model(kind="video", predictor="relative"):
    torch.manual_seed(0)
    clip_size, patch_size = SHAPES[kind]
    grid = TokenGrid.of_clip(clip_size, patch_size)
    shape = Geometry(grid, patch_size, TransformerSize(32, 2, 4), "sequence")
    return shape.autoencoder(TransformerSize(16, 1, 2), predictor=predictor != "none")


def make(
    kind="video",
    strategy="easy_to_hard",
    predictor="relative",
    target="per_channel",
    teacher=None,
    **levers,
):
    student = make_model(kind, predictor)
    grid, patch_size = student.grid, student.settings.patch_size
    if predictor != "none":
        teacher = teacher or make_ema(student)
    objective = HardPatchesMining(
        {"": MaskRule(grid, "token", grid.num_tokens * 3 // 4, STRATEGIES[strategy])},
        PixelTarget(patch_size, (0.5,) * 3, (0.25,) * 3, target),
        predictor=predictor,
        predictor_weight=1.0,
        ema=teacher,
        momentum=MomentumSchedule("warmup", 0.0, 0.99),
        **levers,
    )
    optimizer = make_adamw(parameter_groups(student, 0.05), betas=(0.9, 0.95))
    return student, objective, TorchEngine(student, optimizer, device=CPU)


def train(student, objective, engine, batch, updates, epochs=10):
    history = []
    for update in range(updates):
        progress = Progress(update, update * epochs / updates, epochs)
        for group in engine.param_groups:
            group["lr"] = 3e-3
        losses = objective.losses(engine, batch, progress)
        engine.backward(losses.total)
        engine.step()
        objective.after_update(student, progress)
        history.append(losses)
    return history


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("predictor", ["relative", "absolute"])
def test_student_learns_one_batch_by_heart(kind, predictor):
    student, objective, engine = make(kind, predictor=predictor)
    history = train(student, objective, engine, random_batch(SHAPES[kind][0], 2), 60)
    first, last = (
        sum(h.parts["reconstruction"].item() for h in part) for part in (history[:5], history[-5:])
    )
    assert last < 0.95 * first
    assert not any(p.requires_grad for p in objective.ema.parameters())


def test_predictor_finds_a_planted_hard_region():
    """Left half: smooth ramps, which can be learned. Right half: new noise in every clip."""
    student, objective, engine = make(strategy="random", target="raw")
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 255, 32).view(1, 1, 1, 32, 1).expand(8, 3, 4, 32, 16)
    noise = torch.randint(256, (8, 3, 4, 32, 16), generator=generator)
    batch = batch_of(torch.cat([ramp.to(torch.uint8), noise.to(torch.uint8)], dim=-1))
    train(student, objective, engine, batch, 60)

    measures = measure(objective, engine, [batch])
    assert measures["student_ranking"] > 0.7


def test_loss_is_the_sum_of_its_parts_and_reaches_the_encoder_from_both():
    student, objective, engine = make()
    losses = objective.losses(engine, random_batch((4, 32, 32)), Progress(0, 0, 1))
    assert set(losses.parts) == {"reconstruction", "prediction"}
    torch.testing.assert_close(losses.total, sum(losses.parts.values()))
    for part in losses.parts.values():
        gradient = torch.autograd.grad(part, student.patch_embed.proj.weight, retain_graph=True)[0]
        assert gradient.abs().sum() > 0
    pixel_head = student.reconstructor.head.weight
    unused = torch.autograd.grad(losses.parts["prediction"], pixel_head, allow_unused=True)
    assert unused == (None,)  # the target of the ranking is detached


@pytest.mark.parametrize(
    ("strategy", "epoch", "calls"),
    [
        ("random", 9, 0),
        ("easy_to_hard", 0, 0),  # int(24 x 0.5 x 1 / 100) = 0
        ("easy_to_hard", 9, 1),
        ("hard_to_easy", 0, 1),
        ("hard_to_easy", 99, 0),
        ("hardest", 0, 1),
        ("easiest", 0, 1),
    ],
)
def test_teacher_runs_only_where_something_is_picked(strategy, epoch, calls):
    _, objective, engine = make(strategy=strategy)
    ran = []
    objective.ema.norm.register_forward_hook(lambda *_: ran.append(1))
    objective.ema.reconstructor.register_forward_hook(lambda *_: pytest.fail("ran"))
    objective.losses(engine, random_batch((4, 32, 32)), Progress(0, epoch, 100))
    assert len(ran) == calls


def test_the_hardest_of_the_teacher_are_hidden(monkeypatch):
    _, objective, engine = make(strategy="easy_to_hard")
    scores = torch.rand(4, 32)
    monkeypatch.setattr(objective.ema, "score", lambda encoded, grid, seen: scores)
    seen = []
    engine.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    objective.losses(engine, random_batch((4, 32, 32)), Progress(0, 9.5, 10))
    hardest = scores.topk(12, dim=1).indices
    assert seen[0].masked.gather(1, hardest).all()
    assert seen[0].masked.sum(dim=1).tolist() == [24] * 4


@pytest.mark.parametrize(("view", "count"), [("all", 32), ("checkerboard", 16), ("quarter", 8)])
def test_the_teacher_scores_all_tokens_whatever_its_encoder_sees(view, count):
    _, objective, engine = make(strategy="hardest", teacher_sees=view)
    encoded, drawn = [], []
    objective.ema.norm.register_forward_hook(lambda *call: encoded.append(call[2].shape[1]))
    engine.model.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[1].masked))
    batch = random_batch((4, 32, 32))
    objective.losses(engine, batch, Progress(0, 9, 10))
    assert encoded == [count]
    hardest = objective.difficulty(batch).topk(24, dim=1).indices
    assert drawn[0].gather(1, hardest).all()


class Oracle(torch.nn.Module):
    """Its prediction for a token does not depend on which other tokens are predicted."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.content, self.difficulty = (torch.randn(32, n, generator=draw) for n in (384, 1))

    def forward(self, clips, mask, keys=None):
        content, difficulty = (table[mask.masked_ids] for table in (self.content, self.difficulty))
        return Prediction(content, difficulty.squeeze(-1))


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_losses_of_a_share_of_the_hidden_tokens_are_unbiased(share):
    """Their mean over many draws is the loss over all hidden tokens with the same masks."""
    batch, found = random_batch((4, 32, 32), 1), {}
    same = dataclasses.replace(batch, clips=batch.clips.expand(60, -1, -1, -1, -1))
    for decoded in (1.0, share):
        _, objective, _ = make(strategy="random", decoded_share=decoded)
        draws = torch.arange(20 * 60).view(20, 60)
        batches = [dataclasses.replace(same, keys=keys) for keys in draws]
        found[decoded] = [objective.losses(Oracle(), each, FIRST).parts for each in batches]
    for name in found[share][0]:
        full, part = (torch.stack([parts[name] for parts in all_of]) for all_of in found.values())
        error = (part - full).std() / 20**0.5
        assert 0 < error < 0.01 * full.mean(), "a bias of a few percent would be seen"
        assert (part - full).mean().abs() < 4 * error


@pytest.mark.parametrize("predictor", ["relative", "absolute"])
def test_however_small_the_share_two_tokens_are_compared(predictor):
    student, objective, _ = make(predictor=predictor, decoded_share=0.001)
    losses = objective.losses(student, random_batch((4, 32, 32)), FIRST)
    losses.total.backward()
    assert losses.parts["prediction"] > 0
    assert student.patch_embed.proj.weight.grad.isfinite().all()


def test_masks_depend_on_the_keys_of_the_clips_alone():
    _, objective, engine = make()
    batch = random_batch((4, 32, 32))
    part = dataclasses.replace(batch, clips=batch.clips[2:3], keys=batch.keys[2:3])
    one, other = objective.evaluate(engine, batch, ["one", "other"])
    (of_part,) = objective.evaluate(engine, part, ["one"])
    assert torch.equal(of_part.mask.masked, one.mask.masked[2:3])
    assert not torch.equal(other.mask.masked, one.mask.masked)


def test_plain_masked_autoencoder_has_no_teacher_and_one_loss():
    _, objective, engine = make(strategy="random", predictor="none")
    losses = objective.losses(engine, random_batch((4, 32, 32)), Progress(0, 0, 1))
    assert list(losses.parts) == ["reconstruction"]
    assert objective.auxiliary_modules == {}
    assert list(measure(objective, engine, [random_batch((4, 32, 32))]))[0] == "relative_error"


@pytest.mark.parametrize("levers", [{}, {"teacher_sees": "quarter", "decoded_share": 0.5}])
def test_nothing_in_an_update_waits_for_the_device(levers):
    """Fake tensors have no values: reading one raises an error."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode() as mode:
        # A copy of a fake model would copy its fake mode, so the teacher is built anew.
        student, objective, _ = make(teacher=make_model(), **levers)
        batch = batch_of(torch.empty(4, 3, 4, 32, 32, dtype=torch.uint8))
        engine = TorchEngine(
            student,
            torch.optim.AdamW(student.parameters()),
            device=CPU,
            clip_grad=1.0,
        )
        meter = Meter(CPU)
        for update in range(2):
            losses = objective.losses(engine, batch, Progress(update, 9.5, 10))
            engine.backward(losses.total)
            engine.step()
            objective.after_update(student, Progress(update, 9.5, 10))
            meter.add(update, losses, batch.files)
        assert losses.total.fake_mode is mode
        with pytest.raises(DataDependentOutputException):
            losses.total.item()


def test_trivial_rankers_see_what_their_names_say():
    clips = torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8)
    clips[:, :, :, :8, :8] = (torch.rand(8, 8) * 255).to(torch.uint8)  # texture, still
    clips[:, :, 2:, 8:, 8:] = 200  # flat, with one jump in brightness
    scores = trivial_difficulties(clips, (2, 8, 8))
    assert scores["variance"].argmax().item() in (0, 4)
    assert scores["motion"].argmax().item() == 7
    assert torch.equal(scores["flatness"], -scores["variance"])
    still = trivial_difficulties(clips[:, :, :2], (2, 8, 8))
    assert set(still) == {"variance", "flatness"}, "no motion, so no order"
    image = trivial_difficulties(clips[:, :, :1], (1, 8, 8))
    assert set(image) == {"variance", "flatness"}


def test_levers_are_compared_with_the_exact_method(monkeypatch):
    """The teacher ranks in the opposite order unless it sees all tokens."""
    student, objective, engine = make()
    forward = torch.arange(32.0).expand(4, -1)
    monkeypatch.setattr(
        objective.ema, "score", lambda encoded, grid, seen: forward if seen is None else -forward
    )
    batches = [random_batch((4, 32, 32))]
    found, again = (measure_levers(objective, engine, batches, [0.5], seed) for seed in (0, 1))
    assert found["all/overlap"] == 1
    assert found["random scores/overlap"] == pytest.approx(12 / 32, abs=0.25)
    assert found["checkerboard/overlap"] == 0
    backward = 1 - found["all/ranking"]
    assert found["checkerboard/ranking"] == pytest.approx(backward, abs=0.02)
    assert found["all/ranking"] != again["all/ranking"]
    part, full = (
        found[f"{share}/relative_error"] / again[f"{share}/relative_error"] for share in (0.5, 1.0)
    )
    assert part == pytest.approx(1, abs=0.05) == full
    assert part != full
    assert objective.teacher_sees == "all"


def test_relative_error_of_predicting_the_mean_is_one(monkeypatch):
    student, objective, engine = make(strategy="random", predictor="none")
    torch.nn.init.zeros_(student.reconstructor.head.weight)
    batch = random_batch((4, 32, 32))
    assert measure(objective, engine, [batch])["relative_error"] == pytest.approx(1, abs=1e-5)


# --- Several sources ----------------------------------------------------------------------------

LONG, SHORT = TokenGrid(4, 4, 4), TokenGrid(1, 4, 4)


LEVERS = {"teacher_sees": "checkerboard", "decoded_share": 0.5}


def make_mixed(unit="token", predictor="relative", target="pixels", class_token=False, **levers):
    """One model and objective for clips of 4 frames and a source ``images`` of single frames."""
    torch.manual_seed(0)
    size, patch = TransformerSize(32, 2, 4), (1, 8, 8)
    shape = Geometry(LONG, patch, size, "space_time", class_token=class_token, other_grids=(SHORT,))
    width = size.dim if target == "ema" else None
    student = shape.autoencoder(
        TransformerSize(16, 1, 2), predictor=predictor != "none", target_width=width
    )
    look = (patch, (0.5,) * 3, (0.25,) * 3)
    strategy = STRATEGIES["random" if predictor == "none" else "easy_to_hard"]
    masks = {
        name: MaskRule(
            grid,
            unit,
            (grid.num_tokens if unit == "token" else grid.tokens_per_step) * 3 // 4,
            strategy,
        )
        for name, grid in {"": LONG, "images": SHORT}.items()
    }
    objective = HardPatchesMining(
        masks,
        FeatureTarget(*look, None) if target == "ema" else PixelTarget(*look, "per_channel"),
        predictor=predictor,
        predictor_weight=1.0,
        ema=None if predictor == "none" else make_ema(student),
        momentum=MomentumSchedule("warmup", 0.0, 0.99),
        **levers,
    )
    optimizer = make_adamw(parameter_groups(student, 0.05), betas=(0.9, 0.95))
    return student, objective, TorchEngine(student, optimizer, device=CPU)


def images(batch=4):
    return dataclasses.replace(random_batch((1, 32, 32), batch), source="images")


def lines_run(work):
    """Every line of the package that ``work`` executes: {(module, function, line)}"""
    package, seen = str(Path(hpm_video.__file__).parent), set()

    def trace(frame, event, _argument):
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            code = frame.f_code
            seen.add((Path(code.co_filename).stem, code.co_name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit": "tube", "class_token": True},
        {"predictor": "absolute", "target": "ema"},
        {"predictor": "none"},
        LEVERS,
    ],
)
def test_one_time_step_and_several_run_the_same_lines(options):
    """The same objects handle both, and no line of the package exists for only one of them."""
    student, objective, engine = make_mixed(**options)
    ran = []
    for batch in (random_batch((4, 32, 32)), images()):
        before = student.patch_embed.proj.weight.clone()

        def update(batch=batch):
            losses = objective.losses(engine, batch, Progress(3, 9, 10))
            engine.backward(losses.total)
            for group in engine.param_groups:
                group["lr"] = 1e-3
            engine.step()
            objective.after_update(student, Progress(3, 9, 10))
            objective.evaluate(engine, batch, ["a"])

        ran.append(lines_run(update))
        assert not torch.equal(student.patch_embed.proj.weight, before)
    assert ran[0] == ran[1]
    functions = {place[:2] for place in ran[0]}
    assert {("objective", "losses"), ("masking", "draw"), ("encoder", "encode")} <= functions


def test_only_motion_is_measured_otherwise_of_one_time_step():
    _, objective, engine = make_mixed()
    ran = [
        lines_run(lambda batch=batch: measure(objective, engine, [batch]))
        for batch in (random_batch((4, 32, 32)), images())
    ]
    assert {place[:2] for place in ran[0] ^ ran[1]} == {("validation", "trivial_difficulties")}


def test_losses_and_settings_are_named_by_their_source():
    student, objective, _ = make_mixed()
    progress = Progress(0, 9, 10)
    parts = {"reconstruction", "prediction"}
    assert set(objective.losses(student, random_batch((4, 32, 32)), progress).parts) == parts
    of_images = objective.losses(student, images(), progress)
    assert set(of_images.parts) == {f"images/{part}" for part in parts}
    torch.testing.assert_close(of_images.total, sum(of_images.parts.values()))
    settings = objective.settings(progress)
    assert set(settings) == {"hard_fraction", "images/hard_fraction", "momentum"}
    assert (named("", "loss"), named("images", "loss")) == ("loss", "images/loss")


def test_each_source_is_masked_by_its_own_rule():
    _, objective, engine = make_mixed()
    fewer = dataclasses.replace(objective.masks["images"], num_masked=5)
    objective.masks = {**objective.masks, "images": fewer}
    seen = []
    engine.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    for batch in (random_batch((4, 32, 32)), images()):
        objective.losses(engine, batch, Progress(0, 0, 10))
    assert [mask.masked.shape for mask in seen] == [(4, 64), (4, 16)]
    assert [mask.masked.sum(dim=1).tolist() for mask in seen] == [[48] * 4, [5] * 4]


def test_a_mixture_is_learned_by_heart():
    student, objective, engine = make_mixed()
    first = train(student, objective, engine, random_batch((4, 32, 32), 2), 1)
    first += train(student, objective, engine, images(2), 1)
    for _ in range(40):
        last = train(student, objective, engine, random_batch((4, 32, 32), 2), 1)
        last += train(student, objective, engine, images(2), 1)
    for name, before, after in zip(("", "images"), first, last, strict=True):
        part = named(name, "reconstruction")
        assert after.parts[part] < 0.9 * before.parts[part]


def test_measures_of_several_sources_are_reported_one_after_the_other():
    measures = {
        "relative_error": 0.5,
        "teacher_ranking": 0.75,
        "ranking_by_variance": 0.6,
        "images/relative_error": 0.25,
    }
    assert describe_sources(("", "images"), "the patch mean", measures).splitlines() == [
        "validation: error 0.500 of the patch mean's",
        "  ranking by the teacher 0.750 (without a model: variance 0.600)",
        "images, validation: error 0.250 of the patch mean's",
    ]
