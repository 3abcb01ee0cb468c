import re
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpm_video.config.batch_plan import BatchPlan, micro_batches, plan_batches
from hpm_video.config.checks import ConfigError
from hpm_video.runs import autotune
from hpm_video.runs.autotune import largest_fitting


@pytest.mark.parametrize(
    ("batch", "processes", "micro", "share", "accumulate"),
    [
        (1024, 1, None, 1024, 1),
        (1024, 8, None, 128, 1),
        (1024, 64, 8, 16, 2),
        (2048, 64, 32, 32, 1),
        (512, 512, 1, 1, 1),
        (6, 1, 2, 6, 3),
    ],
)
def test_a_plan_spreads_the_batch(batch, processes, micro, share, accumulate):
    plan = plan_batches(batch, processes, micro)
    assert plan.accumulate == accumulate
    assert plan == BatchPlan(batch, processes, micro or share)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 3), st.data())
def test_every_video_is_in_one_pass(processes, passes, multiple, data):
    batch = processes * passes * multiple
    possible = micro_batches(batch, processes, multiple)
    assert possible == sorted(set(possible))
    micro = data.draw(st.sampled_from([None, *possible]))
    plan = plan_batches(batch, processes, micro, multiple=multiple)
    assert plan.micro_batch * plan.accumulate * plan.processes == batch
    assert plan.micro_batch % multiple == 0


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
def test_a_plan_comes_out_even_or_is_refused(batch, processes, micro, multiple):
    even = batch % (processes * micro) == 0 and micro % multiple == 0
    try:
        plan = plan_batches(batch, processes, micro, multiple=multiple)
    except ConfigError:
        assert not even
    else:
        assert even
        assert plan.micro_batch * plan.accumulate * plan.processes == batch


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3))
def test_what_a_refusal_says_to_take_is_taken(batch, processes, micro, multiple):
    try:
        plan_batches(batch, processes, micro, multiple=multiple)
    except ConfigError as error:
        message = str(error)
    else:
        return
    if found := re.search(r"take recipe.batch_size=(\d+)", message):
        plan_batches(int(found[1]), processes, None, multiple=multiple)
    else:
        micros = re.search(r"must be one of ([\d, ]+) with", message)[1].split(", ")
        for value in micros:
            plan_batches(batch, processes, int(value), multiple=multiple)


@pytest.mark.parametrize(
    ("arguments", "multiple", "message"),
    [
        (
            (1024, 6, None),
            1,
            "must be a multiple of 6 for processes=6 (GPUS x NNODES), got 1024; take "
            "recipe.batch_size=1026, or another number of processes",
        ),
        (
            (24, 8, None),
            2,
            "a multiple of 16 for processes=8 (GPUS x NNODES) and an even micro-batch (for mixup, "
            "CutMix or a batch norm), got 24; take recipe.batch_size=32,",
        ),
        (
            (1024, 8, 48),
            1,
            "must be one of 1, 2, 4, 8, 16, 32, 64, 128 with recipe.batch_size=1024 and "
            "processes=8, got 48",
        ),
        ((12, 1, 3), 2, "must be one of 2, 4, 6, 12 with"),
        ((12, 1, 0), 1, "got 0"),
    ],
)
def test_a_refusal_names_value_rule_and_remedy(arguments, multiple, message):
    with pytest.raises(ConfigError) as refusal:
        plan_batches(*arguments, multiple=multiple)
    assert message in str(refusal.value)


@given(sizes=st.sets(st.integers(1, 4096), min_size=1, max_size=40), limit=st.integers(1, 5000))
def test_the_largest_that_fits_is_found_in_few_trials(sizes, limit):
    sizes, tried = sorted(sizes), []

    def run(size):
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError(f"no memory for {size}")

    with mock.patch.object(autotune, "gc"):  # there is no garbage
        if sizes[0] > limit:
            with pytest.raises(ConfigError, match=f"engine.micro_batch={sizes[0]} does not fit"):
                largest_fitting(sizes, run)
            assert tried == sizes[:1]
        else:
            assert largest_fitting(sizes, run) == max(size for size in sizes if size <= limit)
            assert len(tried) == len(set(tried)) <= 1 + (len(sizes) - 1).bit_length()


def test_running_out_of_memory_is_survived_and_what_it_left_is_freed():
    limit, held = 24, []

    class Held:
        def __init__(self):
            held.append(self)

        def __del__(self):
            held_now.discard(id(self))

    held_now = set()

    def run(size):
        activations = Held()
        held_now.add(id(activations))
        held.clear()
        if size > limit:
            raise torch.OutOfMemoryError(f"no memory for {size}")

    sizes = micro_batches(1024, 4)
    assert largest_fitting(sizes, run) == 16
    assert not held_now


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail(size):
        raise RuntimeError(f"shapes differ at {size}")

    with pytest.raises(RuntimeError, match="shapes differ at 1"):
        largest_fitting([1, 2], fail)
