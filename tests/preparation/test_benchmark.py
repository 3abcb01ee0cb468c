"""Rates are reported and compared. The rates themselves depend on the machine."""

import importlib
import json
import os
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tiny_runs import CLASSIFIER, ENGINE

from hpm_video.config.data import DataConfig
from hpm_video.data.clips import VideoClips
from hpm_video.data.manifest import read_manifest
from hpm_video.data.transforms import ClipTransform, MultiScaleCrop
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import available_decoders
from hpm_video.files.failures import Failure, TooManyBadFiles
from hpm_video.preparation import benchmark
from hpm_video.preparation.benchmark import (
    PHASES,
    Trial,
    Trials,
    choose_setting,
    explain,
    read_all,
)
from hpm_video.preparation.encode import write_video
from hpm_video.workers.room import RoomError

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parents[2] / "tools"
TAKEN = 0.05


@pytest.fixture
def loader(call_tool):
    """Run ``tools/bench.py loader`` in this process."""
    return lambda *arguments: call_tool("bench", "loader", *arguments)


@pytest.fixture
def commands(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("bench_data")


class Slow(ClipTransform):
    """A crop that takes a certain time by a clock."""

    def __init__(self, clock):
        self.clock = clock

    def draw(self, size, frame_size, draw):
        box, change = MultiScaleCrop(flip=False).draw(size, frame_size, draw)

        def slow_change(pixels):
            self.clock.now += TAKEN
            return change(pixels)

        return box, slow_change


CROP = MultiScaleCrop(flip=False)


def clips_of(folder, transform=CROP, count=1):
    stream = VideoClips(
        read_manifest(folder),
        DataConfig(
            num_frames=4,
            frame_stride=1,
            frame_size=(16, 16),
            repeats=count,
            max_bad_share=0.5,
        ),
        transform,
        seed=0,
    )
    return [stream]


class Clock:
    """Each reading adds a millisecond; tests may add more."""

    now = 0.0

    def perf_counter(self):
        self.now += 1e-3
        return self.now


def test_time_is_put_down_to_its_phase_and_counted_per_clip(videos, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("hpm_video.preparation.benchmark.time", clock)
    for count in (1, 2):
        slow = trials_of(clips_of(videos / "train", Slow(clock), count)).phases(6)
        assert [*slow] == [*PHASES]
        assert slow["augmenting"] == pytest.approx(TAKEN + 1e-3), "of each clip, not of each video"
        assert min(slow[name] for name in ("reading", "decoding")) > 0


def trials_of(clips, *, batch_size=4, seconds=0.05):
    return Trials(clips, [1.0], torch.device("cpu"), batch_size=batch_size, seconds=seconds)


def test_a_rate_is_that_of_the_clips(videos):
    trial = Trial(available_decoders()[0])
    trials_of(clips_of(videos / "train", count=2)).read(trial, 1)
    assert trial.rates[1] > 1
    assert trial.files
    assert trial.files <= set(map(str, (videos / "train").iterdir()))
    assert not trial.refused
    assert trial.error is None


def manifest_of(folder, *files):
    path = folder / "manifest.csv"
    path.write_text("path\n" + "".join(f"{file}\n" for file in files))
    return path


def test_files_that_are_missing_or_no_files_are_left_out_of_phases(videos, tmp_path):
    good = [*(videos / "train").iterdir()][:3]
    os.mkfifo(tmp_path / "pipe.mp4")
    clips = clips_of(
        manifest_of(tmp_path, tmp_path / "gone.mp4", tmp_path / "pipe.mp4", *good), count=1
    )
    assert trials_of(clips).phases(5)["decoding"] > 0
    clips = clips_of(manifest_of(tmp_path, tmp_path / "gone.mp4"))
    with pytest.raises(DecodeError, match=r"none of the first 1 files decodes.*gone\.mp4"):
        trials_of(clips).phases(1)


def write_transport_stream(path, seed):
    """A video that PyAV decodes and decord refuses."""
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width = stream.height = 40
        stream.pix_fmt = "yuv420p"
        for pixels in np.random.default_rng(seed).integers(0, 256, (12, 40, 40, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def transport_streams(tmp_path) -> Path:
    """A folder of videos that decord refuses."""
    folder = tmp_path / "streams"
    folder.mkdir()
    for seed in range(6):
        write_transport_stream(folder / f"{seed}.ts", seed)
    return folder


needs_both = pytest.mark.skipif(
    not {"pyav", "decord"} <= set(available_decoders()), reason="PyAV and decord are compared"
)


@needs_both
def test_a_trial_leaves_the_clips_as_they_are_and_knows_of_no_other(transport_streams):
    clips = clips_of(transport_streams)
    (stream,) = clips
    reader, trials = stream.reader, trials_of(clips, batch_size=2)
    refusing, reading = Trial("decord", {8: 100.0}), Trial("pyav")
    trials.read(refusing, 1)
    assert isinstance(refusing.error, TooManyBadFiles)
    assert refusing.rates == {}, "rates of another number of processes no longer count"
    assert {Path(path).parent for path in refusing.refused} == {transport_streams}
    assert stream.reader is reader
    assert stream.bad == {}
    trials.read(reading, 1)
    assert reading.rates[1] > 0


@needs_both
def test_a_decoder_that_refuses_the_files_is_reported_and_the_others_go_on(
    config_file, transport_streams, loader
):
    arguments = ("--seconds", "0.05", "--workers", "1", "--clips", "3")
    code, output = loader(config_file, f"data.train={transport_streams}", *arguments)
    assert code == 0, output
    assert re.search(r"^one clip, by pyav$", output, re.M), output
    assert re.search(r"^ *decord +NaN +refuses \d of \d files, such as .*\.ts: ", output, re.M), (
        output
    )
    assert re.search(r"^ *pyav +[\d.]+ ", output, re.M), output
    assert "take data.decoder=pyav data.workers=1" in output


@needs_both
def test_where_all_decoders_refuse_the_files_it_is_a_wrong_input(
    config_file, transport_streams, loader
):
    arguments = ("--seconds", "0.05", "--workers", "1", "--clips", "3")
    data = (f"data.train={transport_streams}", "data.decoder=decord")
    code, output = loader(config_file, *data, *arguments)
    assert code == 2
    assert "Traceback" not in output
    assert re.search(r"error: \d+ of 6 files do not decode", output)


def test_a_decoder_that_refuses_too_many_of_the_files_it_tried_is_not_recommended():
    def trial(decoder, rates, refused):
        failures = {f"bad {n}": Failure(f"bad {n}", "no") for n in range(refused)}
        files = {str(number) for number in range(20 - refused)}
        return Trial(decoder, rates, files=files, refused=failures)

    few, many = trial("pyav", {1: 5.0}, 10), trial("decord", {1: 50.0, 2: 60.0}, 11)
    assert choose_setting([few, many], 0.5) == (few, 1)
    assert choose_setting([many], 0.5) == (many, 2), "better than nothing"


@pytest.mark.parametrize(
    "error", [RoomError("too small"), TooManyBadFiles([Failure("too", "")], 1, 0.0)]
)
def test_where_nothing_could_be_measured_the_reason_is_raised(error):
    with pytest.raises(type(error), match="too"):
        choose_setting([Trial("pyav", error=error), Trial("decord")], 0.5)


def test_where_there_is_no_room_for_so_many_the_others_are_measured(videos, monkeypatch):
    def without_room(*_, workers, **__):
        raise RoomError(f"no room for {workers}")

    trial = Trial(available_decoders()[0], {1: 5.0})
    monkeypatch.setattr("hpm_video.preparation.benchmark.clip_batches", without_room)
    trials_of(clips_of(videos / "train")).read(trial, 2)
    assert (trial.rates, str(trial.error)) == ({1: 5.0}, "no room for 2")


def test_every_kind_of_place_is_read(tmp_path, monkeypatch):
    frames = tmp_path / "frames"
    frames.mkdir()
    for path in (frames / "1.jpg", frames / "2.jpg", tmp_path / "a.mp4"):
        path.write_bytes(b"content")
    read = []
    monkeypatch.setattr(benchmark, "read_bytes", lambda path: read.append(Path(path).name))
    for place in (f"{frames}/", f"{tmp_path}/a.mp4", f"{tmp_path}/a.mp4#t=0,1"):
        read_all(place)
    assert read == ["1.jpg", "2.jpg", "a.mp4", "a.mp4"]
    monkeypatch.undo()
    read_all(f"{tmp_path}/gone")


def test_nothing_is_read_twice(videos):
    trials = trials_of(clips_of(videos / "train"))
    trials.read(Trial("pyav"), 1)
    after_trial = trials.places()[0].position
    assert after_trial > 0
    trials.phases(3)
    assert trials.places()[0].position > after_trial


SECONDS = {"reading": 1, "decoding": 6, "augmenting": 3, "copying": 1, "assembling": 2}


@pytest.mark.parametrize(
    ("slow", "workers", "rate", "why"),
    [
        ({}, 4, 1 / 2.5, "limited by decoding"),
        ({}, 5, 1 / 2, "limited by "),
        ({}, 100, 1 / 2, "limited by assembling"),
        ({"reading": 7}, 1, 1 / 16, "limited by reading"),
        ({"copying": 3}, 100, 1 / 3, "limited by copying"),
    ],
)
def test_the_phase_that_keeps_the_others_waiting_is_named(slow, workers, rate, why):
    line = explain(rate, SECONDS | slow, workers, 200)
    assert line.startswith(f"by the phases {rate:.1f} clips/s, {why}")
    assert line.endswith(f"measured: {rate:.1f}"), "there is nothing to explain"


@pytest.mark.parametrize(
    ("rate", "workers", "cores", "why"),
    [
        (0.2, 4, 4, ", since 4 processes and the run share 4 cores"),
        (0.2, 4, 5, ": side by side, processes wait for the disk or for memory"),
        (0.6, 4, 4, ": the files that were timed alone take longer than most"),
        (0.31, 4, 4, ""),
        (0.49, 4, 4, ""),
    ],
)
def test_a_rate_that_the_phases_do_not_explain_is_explained(rate, workers, cores, why):
    line = explain(rate, SECONDS, workers, cores)
    assert line.partition(f"measured: {rate:.1f}")[2].startswith(why)
    assert why or line.endswith(f"measured: {rate:.1f}")


def test_what_updates_need_is_measured_and_compared(commands, config_file):
    task = commands.Pretraining(commands.load_any_config(Path(config_file), []))
    assert commands.rate_of_updates(task, torch.device("cpu"), 4) > 1
    assert commands.verdict(700, 420).endswith("takes 420.0: 1.7 times what is needed")
    assert commands.verdict(210, 420).endswith("it would wait for data 50% of the time")


@pytest.mark.parametrize("every", [1, 12])
def test_decoding_is_measured_on_whole_files_at_a_stride_that_they_hold(tmp_path, call_tool, every):
    write_video(tmp_path / "a.mp4", [np.zeros((48, 64, 3), np.uint8)] * 20)
    (tmp_path / "list.csv").write_text(f"path,start,end,kept_every\na.mp4,0.2,0.4,{every}\n")
    options = ("--repeats", "1", "--views", "1x1", "--clips", "2", "--output", tmp_path / "a.json")
    code, output = call_tool("bench", "decoding", tmp_path / "list.csv", *options)
    if every == 12:
        assert code == 2
        assert "a.mp4#t=0.2,0.4 holds one of every 12 frames" in output
        return
    assert code == 0, output
    tables = json.loads((tmp_path / "a.json").read_text())
    assert {name: len(rows) for name, rows in tables.items()} == {
        "a training clip": (count := len(available_decoders())),
        "2 training clips": 2 * count,
        "a test of 1 x 1 views": count,
    }
    assert all(row["ms"] > 0 for rows in tables.values() for row in rows)


def test_forms_of_the_loss_agree(tmp_path, call_tool):
    table = tmp_path / "a.json"
    sizes = ("--clips", "2", "--tokens", "300", "--repeats", "1")
    assert call_tool("bench", "losses", *sizes, "--output", table)[0] == 0
    ((plain, blockwise),) = json.loads(table.read_text()).values()
    assert blockwise["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert blockwise["peak memory, MB"] < plain["peak memory, MB"]


def test_numbers_that_are_tried_come_out_even(commands, monkeypatch):
    monkeypatch.setattr(commands, "usable_cores", lambda: 48)
    assert commands.workers_to_try(None, 1) == [1, 2, 4, 8, 16, 32, 48]
    assert commands.workers_to_try(None, 8) == [8, 16, 32, 48]
    assert commands.workers_to_try(None, 64) == [64], "fewer cores: one process for each"
    assert commands.workers_to_try([3, 9, 17], 8) == [8, 16]


def test_the_fewest_processes_that_are_nearly_as_fast_are_taken():
    trials = [Trial("pyav", {8: 40.0, 16: 100.0}), Trial("decord", {32: 101.0})]
    assert choose_setting(trials, 0.5) == (trials[0], 16)


def test_the_tool_reports_what_several_processes_take(labelled_videos, loader, tmp_path):
    config = tmp_path / "finetune.yaml"
    folders = {name: labelled_videos / name for name in ("train", "validation")}
    recipe = "init_weights: null\naugmentation: {{rand_augment: null}}\n"
    config.write_text((CLASSIFIER + recipe + ENGINE).format(**folders))
    arguments = ("--seconds", "0.05", "--workers", "2", "--clips", "3", "--processes", "2")
    code, output = loader(config, "data.decoder=pyav", *arguments, "--needs", "1e9")
    assert code == 0, output
    taken = r"^take data.decoder=\w+ data.workers=1 for each of 2 processes: [\d.]+ clips/s$"
    assert re.search(taken, output, re.M)
    assert "the update takes 1000000000.0: it would wait for data 100% of the time" in output


def test_the_tool_reports_rates_phases_and_what_to_take(config_file, loader, tmp_path):
    table = tmp_path / "tables" / "rates.json"
    arguments = (
        "--seconds",
        "0.05",
        "--workers",
        "1",
        "--workers",
        "2",
        "--clips",
        "3",
        "--output",
        table,
    )
    code, output = loader(config_file, *arguments)
    assert code == 0, output
    rates, phases = json.loads(table.read_text()).values()
    assert [row["decoder"] for row in rates] == [*available_decoders()]
    assert all(row["1"] > 0 and row["2"] > 0 for row in rates)
    assert [row["phase"] for row in phases] == [*PHASES, "assembling"]
    assert all(row["ms"] > 0 for row in phases)
    found = re.search(r"^take data.decoder=(\w+) data.workers=(\d): ([\d.]+) ", output, re.M)
    rate = {row["decoder"]: row for row in rates}[found[1]][found[2]]
    assert float(found[3]) == pytest.approx(rate, abs=0.06)
    assert re.search(r"^by the phases [\d.]+ clips/s, limited by \w+; measured: ", output, re.M)
    assert "--needs=CLIPS says whether that is enough" in output
