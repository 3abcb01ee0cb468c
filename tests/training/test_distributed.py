"""Communication of processes, as far as one process can show it; see also tests/processes."""

from datetime import timedelta

import pytest
import torch

from hpm_video.training.device import EngineError
from hpm_video.training.distributed import (
    Processes,
    first_to_say,
    is_first_process,
    joined_processes,
    lost_contact,
)


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer",
        "Connection reset by peer",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_process_that_is_gone_is_told_from_other_errors(message):
    assert lost_contact(RuntimeError(message))


@pytest.mark.parametrize(
    "message",
    [
        "NCCL error: unhandled cuda error. Last error: Failed to CUDA calloc async 608 bytes",
        "NCCL error: invalid usage. Last error: Duplicate GPU detected : rank 1 and rank 0",
        "mat1 and mat2 shapes cannot be multiplied",
    ],
)
def test_other_errors_are_no_lost_contact(message):
    assert not lost_contact(RuntimeError(message))


def test_a_process_alone_has_everything_and_waits_for_nobody():
    alone = Processes()
    assert alone.is_first
    assert alone.gather([1, 2]) == [1, 2]
    assert alone.of_first(lambda: "x") == "x"
    assert alone.ask(15)() == 15
    assert torch.equal(alone.gather_shards(torch.ones(3)), torch.ones(3))


def test_before_processes_have_joined_the_first_one_reports(monkeypatch):
    for rank, tells in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_first_process() == first_to_say("anything") == tells


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("GPUS", raising=False)


@pytest.mark.parametrize(("gpus", "hints"), [(None, 1), ("1", 0)])
def test_a_process_that_leaves_gpus_idle_says_so_unless_it_is_wanted(
    four_gpus, monkeypatch, caplog, gpus, hints
):
    if gpus is not None:
        monkeypatch.setenv("GPUS", gpus)
    with caplog.at_level("INFO"), joined_processes() as processes:
        assert processes.count == 1
    assert caplog.messages == ["of 4 GPUs, one is used; GPUS=4 ./run_... uses all"] * hints


def test_more_processes_than_gpus_are_refused(four_gpus, monkeypatch):
    for name, value in (("WORLD_SIZE", "5"), ("RANK", "4"), ("LOCAL_RANK", "4")):
        monkeypatch.setenv(name, value)
    told = "this machine has 4 GPUs, and process 5 of it finds none left"
    with pytest.raises(EngineError, match=told), joined_processes():
        pass


@pytest.mark.slow
def test_a_process_that_finds_no_others_says_where_it_looked(monkeypatch):
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"MASTER_ADDR": "there-is-no-such-host.invalid", "MASTER_PORT": "29511"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("hpm_video.training.distributed.SILENCE", timedelta(seconds=2))
    told = r"(?s)no-such-host\.invalid:29511 .*GLOO_SOCKET_IFNAME"
    with pytest.raises(EngineError, match=told), joined_processes():
        pass
