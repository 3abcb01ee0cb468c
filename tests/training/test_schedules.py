import math
from types import SimpleNamespace

import pytest
import torch
from geometry import Geometry
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.config.choices import TransformerSize
from hpm_video.config.training import RecipeConfig
from hpm_video.tokens.grid import TokenGrid
from hpm_video.training.ema import MomentumSchedule, ema_update_module, make_ema
from hpm_video.training.loop import fit
from hpm_video.training.metrics import Meter
from hpm_video.training.optim import (
    OPTIMIZERS,
    Schedule,
    layer_decay_of,
    make_adamw,
    parameter_groups,
    schedule_of,
)
from hpm_video.training.progress import Progress, Timeline


def at(epoch, epochs=800, update=0):
    return Progress(update, epoch, epochs)


def test_learning_rate_warms_up_from_0_and_falls_to_the_last():
    schedule = Schedule(peak=1.2e-3, final=8e-5, warmup_epochs=40)
    assert schedule.at(at(0)) == 0
    assert schedule.at(at(20)) == pytest.approx(6e-4)
    assert schedule.at(at(40)) == pytest.approx(1.2e-3)
    assert schedule.at(at(420)) == pytest.approx((1.2e-3 + 8e-5) / 2)
    assert schedule.at(at(800)) == pytest.approx(8e-5)
    quarter = 8e-5 + (1.2e-3 - 8e-5) * (1 + math.cos(math.pi / 4)) / 2
    assert schedule.at(at(230)) == pytest.approx(quarter)


def test_no_warmup_and_nothing_but_warmup():
    assert Schedule(1.0, 0.0, 0).at(at(0, 4)) == 1
    assert Schedule(1.0, 0.0, 4).at(at(3, 4)) == 0.75


def test_learning_rate_scales_with_the_batch():
    recipe = RecipeConfig(batch_size=2048, base_lr=1.5e-4, min_lr=1e-5, warmup_epochs=3)
    schedule = schedule_of(recipe)
    assert (schedule.peak, schedule.final) == pytest.approx((1.2e-3, 8e-5))
    assert schedule.warmup_epochs == 3


def test_momentum_of_the_paper():
    momentum = MomentumSchedule("paper", 0.999, 0.9999)
    assert momentum.at(at(0)) == 0.999
    assert momentum.at(at(50.7)) == pytest.approx(0.999 + 0.0009 * 50 / 100)
    assert momentum.at(at(100)) == pytest.approx(0.9999)
    assert momentum.at(at(700)) == pytest.approx(0.9999)


def test_momentum_that_warms_up():
    momentum = MomentumSchedule("warmup", 0.0, 0.996)
    assert [momentum.at(at(0, update=n)) for n in (0, 8, 10_000)] == [0.1, 0.5, 0.996]


def test_teacher_follows_in_steps_that_bf16_would_lose():
    student = torch.nn.Linear(2, 2)
    teacher = make_ema(student)
    before = teacher.weight.clone()
    torch.nn.init.constant_(student.weight, 1.0)
    ema_update_module(teacher, student, 0.9999)
    torch.testing.assert_close(teacher.weight, before + 1e-4 * (1 - before), rtol=1e-6, atol=0)
    assert not torch.equal(teacher.weight, before)
    assert teacher.weight.dtype == torch.float32


def test_vectors_do_not_decay():
    size = TransformerSize(16, 1, 2)
    shape = Geometry(TokenGrid(1, 2, 2), (1, 4, 4), size, "sequence")
    model = shape.autoencoder(size)
    decayed, kept = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05
    assert kept["weight_decay"] == 0
    assert {names[id(p)].rsplit(".")[-1] for p in decayed["params"]} == {"weight"}
    not_decayed = {names[id(p)] for p in kept["params"]}
    assert "mask_token" in not_decayed
    assert "norm.weight" in not_decayed
    assert len(names) == len(decayed["params"]) + len(kept["params"])


@given(
    videos=st.integers(1, 50),
    batch=st.integers(1, 60),
    epochs=st.integers(1, 9),
    every=st.floats(0.3, 4),
)
def test_timeline_counts_videos(videos, batch, epochs, every):
    if videos * epochs < batch:
        with pytest.raises(ValueError, match=f"are less than one batch of {batch}"):
            Timeline(videos, batch, epochs)
        return
    timeline = Timeline(videos, batch, epochs)
    updates = range(timeline.num_updates)
    assert (len(updates) + 1) * batch > videos * epochs >= len(updates) * batch
    assert [timeline.at(u).epoch for u in updates] == [u * batch // videos for u in updates]
    completed = sum(timeline.passes(update, every) for update in updates)
    total = int(timeline.at(len(updates)).exact_epoch / every)
    assert completed == total or batch > videos * every  # one batch may complete several epochs


def test_the_loop_gives_each_group_its_share_of_the_learning_rate():
    groups = [{"lr_scale": 0.25}, {"lr_scale": 1.0}, {}]
    engine = SimpleNamespace(
        accumulate=0, model=None, param_groups=groups, gradient_norm=torch.zeros(())
    )
    objective = SimpleNamespace(settings=lambda _: {"more": 1.0}, after_update=lambda *_: None)
    seen, logged = [], []

    def after_update(progress, settings):
        seen.append([group["lr"] for group in groups])
        logged.append(settings)

    timeline = Timeline(8, 2, 2)
    meter = Meter(torch.device("cpu"))
    run = SimpleNamespace(timeline=timeline, meter=meter, after_update=after_update)
    schedule = Schedule(peak=1.0, final=0.1, warmup_epochs=1)
    fit(engine, objective, iter(()), schedule, run, start=3)
    expected = [schedule.at(timeline.at(update)) for update in range(3, 8)]
    assert expected[0] == 0.75
    assert seen == [[0.25 * lr, lr, lr] for lr in expected]
    assert logged == [{"lr": lr, "more": 1.0} for lr in expected]


def test_layer_decay_falls_from_the_head_to_the_patches():
    scale = layer_decay_of({"patches": 0, "first": 1, "last": 2, "head": 3}.__getitem__, 4, 0.5)
    assert [scale(name) for name in ("patches", "first", "last", "head")] == [0.125, 0.25, 0.5, 1]


def test_parameters_that_do_not_learn_are_in_no_group():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(requires_grad=False)
    groups = parameter_groups(model, 0.05)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model[1].parameters()
    }
    assert all(group["lr_scale"] == 1 for group in groups)


def test_optimizers_start_at_rest_with_the_settings_of_their_groups():
    groups = parameter_groups(torch.nn.Linear(2, 2), 0.05, {"weight": 0.5, "bias": 0.25}.get)
    adamw = make_adamw(groups, betas=(0.9, 0.95))
    sgd = OPTIMIZERS["sgd"](groups, betas=(0.9, 0.999))
    for optimizer in (adamw, sgd):
        assert [(g["lr"], g["weight_decay"], g["lr_scale"]) for g in optimizer.param_groups] == [
            (0, 0.05, 0.5),
            (0, 0, 0.25),
        ]
    assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.9, 0.95), 1e-8)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.9, False)
