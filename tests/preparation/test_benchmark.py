"""Not the rates themselves, which depend on the machine: that they are reported, and the advice."""

import csv
import importlib
import json
import os
import re
import shutil
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from tiny_runs import CLASSIFIER, ENGINE

from hpm_video.config.data import DataConfig
from hpm_video.config.loading import load_config
from hpm_video.config.schema import PretrainConfig
from hpm_video.data.batch import collate
from hpm_video.data.clips import VideoClips
from hpm_video.data.manifest import read_manifest
from hpm_video.data.transforms import ClipTransform, MultiScaleCrop
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import available_decoders
from hpm_video.files.failures import Failure, TooManyBadFiles
from hpm_video.preparation import loader_advice
from hpm_video.preparation.benchmark import (
    IN_WORKERS,
    NUM_PLACES,
    Trial,
    Trials,
    copy_seconds,
    fits_into_memory,
    read_all,
    worker_seconds,
)
from hpm_video.preparation.encode import write_video
from hpm_video.preparation.findings import stamp_of
from hpm_video.runs.pretraining import Pretraining
from hpm_video.workers.pool import NAME
from hpm_video.workers.room import RoomError

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parents[2] / "tools"
TAKEN = 0.05
RUN = Path(__file__).parent.parent / "first_house" / "fixtures" / "runs" / "video"
"""A run of an earlier version, with the log that it wrote."""


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run ``tools/bench.py`` in this process, whose pools have started already. -> code, output"""
    monkeypatch.syspath_prepend(TOOLS)
    program = importlib.import_module("bench")

    def run(*arguments) -> tuple[int, str]:
        code = program.main([*map(str, arguments)])
        return code, "".join(capsys.readouterr())

    return run


class Slow(ClipTransform):
    """A crop that takes its time, by a clock."""

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
    """A millisecond passes between two looks at it, and what is added."""

    now = spent = 0.0

    def perf_counter(self):
        self.now += 1e-3
        return self.now

    def process_time(self):
        return self.spent

    monotonic = perf_counter


def test_time_is_put_down_to_its_phase_and_counted_per_clip(videos, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("hpm_video.preparation.benchmark.time", clock)
    for count in (1, 2):
        trials = trials_of(clips_of(videos / "train", Slow(clock), count), in_memory=True)
        slow = trials.phases(6)
        assert slow["augmenting"] == pytest.approx(TAKEN + 1e-3), "of each clip, not of each video"
        assert slow["copying"] == 0.0
        assert min(slow[name] for name in ("reading", "decoding")) > 0


@pytest.mark.parametrize("slow", ["reading", "decoding", "augmenting", "assembling", "copying"])
def test_the_bottleneck_is_what_is_slow(slow, videos, monkeypatch):
    """By a clock that only the slow part moves; the processes of a trial are pretended."""
    clock = Clock()
    module = "hpm_video.preparation.benchmark"
    clips = clips_of(videos / "train", Slow(clock) if slow == "augmenting" else CROP)
    reader = type(clips[0].reader)

    def taking(name, call):
        def timed(*arguments, **options):
            clock.now += TAKEN if slow == name else 0
            return call(*arguments, **options)

        return timed

    def assembled(streams, places, *, batch_size, **_):
        left = iter(places)
        for _ in range(10):
            samples = [streams[0][place.position] for place in islice(left, batch_size)]
            clock.now += 1.0
            clock.spent += batch_size * (TAKEN if slow == "assembling" else 1e-3)
            yield collate(samples)

    monkeypatch.setattr(f"{module}.time", clock)
    monkeypatch.setattr(f"{module}.read_all", taking("reading", read_all))
    monkeypatch.setattr(reader, "__call__", taking("decoding", reader.__call__))
    monkeypatch.setattr(f"{module}.copy_seconds", lambda *_: TAKEN if slow == "copying" else 1e-3)
    monkeypatch.setattr(f"{module}.clip_batches", assembled)
    trials, trial = trials_of(clips, seconds=5.0), Trial("pyav")
    trials.read(trial, 2)
    phases = trials.phases(6) | {"assembling": trial.assembling[2]}
    assert loader_advice.bottleneck(phases, 2) == slow
    advice = loader_advice.recommend(("pyav", 2), trial.rates[2], phases, 1)
    assert f"the bottleneck is {slow}: " in advice


def test_the_bottleneck_depends_on_the_number_of_workers():
    phases = {"reading": 1, "decoding": 6, "augmenting": 2, "assembling": 0.5, "copying": 1.5}
    assert [loader_advice.bottleneck(phases, workers) for workers in (1, 5, 7, 100)] == [
        "decoding",
        "decoding",
        "copying",
        "copying",
    ]
    assert loader_advice.bottleneck(phases | {"reading": 7}, 1) == "reading"


PHASES = {
    "reading": 1e-3,
    "decoding": 2e-2,
    "augmenting": 3e-3,
    "assembling": 2e-4,
    "copying": 1e-4,
}
"""Of 24 ms in a process: 15 of them give 625 clips/s."""


@pytest.mark.parametrize(
    ("rate", "workers", "taken", "words"),
    [
        (600.0, 15, 0.025, []),
        (480.0, 15, 0.03, []),
        (800.0, 15, 0.018, ["take longer than most"]),
        (400.0, 15, 0.0368, ["takes 36.8 ms of a core, alone 24.0: two threads share a core"]),
        (200.0, 15, 0.024, ["the processes stand still 68% of the time"]),
        (200.0, 15, 0.0, []),
        (250.0, 16, 0.033, ["16 processes and the run share 16 cores", "33.0 ms", "still 48%"]),
    ],
)
def test_a_rate_that_the_phases_do_not_explain_is_explained(rate, workers, taken, words):
    first, *lines = loader_advice.explain(rate, PHASES, workers, taken, 16)
    assert re.fullmatch(rf"by the phases, .* [\d.]+ clips/s; measured: {rate}", first)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_the_run_and_the_copies_limit_what_many_processes_give():
    for name, longest in (("assembling", 0.01), ("copying", 0.02)):
        (first,) = loader_advice.explain(1 / longest, PHASES | {name: longest}, 15, 0.0, 16)
        assert f"alone, {1 / longest:.1f} clips/s" in first


def trials_of(clips, *, batch_size=4, seconds=0.05, in_memory=False):
    cpu = torch.device("cpu")
    return Trials(clips, [1.0], cpu, in_memory=in_memory, batch_size=batch_size, seconds=seconds)


def test_a_rate_is_that_of_the_clips(videos):
    trial = Trial(available_decoders()[0])
    trials_of(clips_of(videos / "train", count=2)).read(trial, 1)
    assert trial.rates[1] > 1
    assert 0 < trial.assembling[1] < 1
    assert 0 <= trial.worker_seconds[1] < 10
    assert trial.files
    assert trial.files <= set(map(str, (videos / "train").iterdir()))
    assert not trial.refused
    assert trial.error is None


def test_the_time_of_processes_is_that_of_their_cores(monkeypatch):
    class Child(NamedTuple):
        name: str
        pid: int

    def seconds_of(*children):
        monkeypatch.setattr("multiprocessing.active_children", lambda: children)
        return worker_seconds()

    before = sum(os.times()[:2])
    found = seconds_of(
        Child(NAME, os.getpid()), Child(NAME, 2**30), Child("of others", os.getpid())
    )
    assert before - 0.1 <= found <= sum(os.times()[:2]) + 0.1
    assert seconds_of() == 0


def test_copies_are_timed_on_the_gpu_from_pinned_memory_after_the_first(monkeypatch):
    done = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("waited")

        def elapsed_time(self, _):
            return 80.0

    class Clips(list):
        def pin_memory(self):
            done.append("pinned")
            return self

        def to(self, _, *, non_blocking):
            assert non_blocking
            done.append("copied")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert copy_seconds(Clips(range(4)), torch.device("cuda")) == pytest.approx(0.002)
    assert done == ["pinned", "copied", "event", *["copied"] * 10, "event", "waited"]
    assert copy_seconds(Clips(range(4)), torch.device("cpu")) == 0


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
    for in_memory in (False, True):
        assert trials_of(clips, in_memory=in_memory).phases(5)["decoding"] > 0
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
    """A folder of such videos."""
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
    assert refusing.rates == {}, "what another number of processes reached counts no more"
    assert {Path(path).parent for path in refusing.refused} == {transport_streams}
    assert stream.reader is reader
    assert stream.bad == {}
    trials.read(reading, 1)
    assert reading.rates[1] > 0


@needs_both
def test_a_decoder_that_refuses_the_files_is_told_and_the_others_go_on(
    config_file, transport_streams, bench
):
    arguments = ("--seconds", "0.05", "--workers", "1", "--clips", "3", "--decoders", "decord,pyav")
    data = (f"data.train={transport_streams}", "data.decoder=decord")
    code, output = bench("loader", config_file, *data, *arguments)
    assert code == 0, output
    assert re.search(r"^one clip, by pyav$", output, re.M), output
    assert re.search(r"^ *decord +NaN +refuses \d of \d files, such as .*\.ts: ", output, re.M), (
        output
    )
    assert re.search(r"^ *pyav +[\d.]+ ", output, re.M), output
    assert "take data.decoder=pyav data.workers=1" in output


@needs_both
def test_where_all_decoders_refuse_the_files_it_is_a_wrong_input(
    config_file, transport_streams, bench
):
    arguments = ("--seconds", "0.05", "--workers", "1", "--clips", "3", "--decoders", "decord")
    code, output = bench("loader", config_file, f"data.train={transport_streams}", *arguments)
    assert code == 2
    assert "Traceback" not in output
    assert re.search(r"error: \d+ of 6 files do not decode", output)


def test_a_decoder_that_refuses_too_many_of_the_files_it_tried_is_not_recommended():
    def trial(decoder, rates, refused):
        failures = {f"bad {n}": Failure(f"bad {n}", "no") for n in range(refused)}
        files = {str(number) for number in range(20 - refused)}
        return Trial(decoder, rates, files=files, refused=failures)

    few, many = trial("pyav", {1: 5.0}, 10), trial("decord", {1: 50.0, 2: 60.0}, 11)
    assert loader_advice.choose_setting([few, many], 0.5) == (("pyav", 1), 5.0)
    assert loader_advice.choose_setting([many], 0.5) == (("decord", 2), 60.0), "better than nothing"


@pytest.mark.parametrize(
    "error", [RoomError("too small"), TooManyBadFiles([Failure("too", "")], 1, 0.0)]
)
def test_where_nothing_could_be_measured_the_reason_is_raised(error):
    with pytest.raises(type(error), match="too"):
        loader_advice.choose_setting([Trial("pyav", error=error), Trial("decord")], 0.5)


def test_where_there_is_no_room_for_so_many_the_others_are_measured(videos, monkeypatch):
    def without_room(*_, workers, **__):
        raise RoomError(f"no room for {workers}")

    trial = Trial(available_decoders()[0], {1: 5.0})
    monkeypatch.setattr("hpm_video.preparation.benchmark.clip_batches", without_room)
    trials_of(clips_of(videos / "train")).read(trial, 2)
    assert (trial.rates, str(trial.error)) == ({1: 5.0}, "no room for 2")


def test_it_is_told_where_files_are_read_from_and_why(videos, monkeypatch):
    clips, files = clips_of(videos / "train"), [*(videos / "train").iterdir()]
    num_bytes = sum(file.stat().st_size for file in files)
    for memory, fits, told in [
        (2 * num_bytes + 2, True, "fit into memory: read from there"),
        (2 * num_bytes - 2, False, "may not fit into memory: read from the disk"),
        (None, False, "may not fit into memory"),
    ]:
        monkeypatch.setattr("hpm_video.preparation.benchmark.memory_left", lambda m=memory: m)
        found, description = fits_into_memory(clips)
        assert found == fits
        assert description.startswith(f"files: {len(files)}, of about 1 MiB, which {told}")


def test_the_bytes_of_every_kind_of_place_are_read(tmp_path):
    frames = tmp_path / "frames"
    frames.mkdir()
    for name in ("1.jpg", "2.jpg"):
        (frames / name).write_bytes(bytes(100))
    (tmp_path / "a.mp4").write_bytes(bytes(50))
    for place, count in ((f"{frames}/", 200), (f"{tmp_path}/a.mp4", 50), (f"{tmp_path}/gone", 0)):
        assert (stamp_of(place).bytes or 0, read_all(place)) == (count, count)
    (tmp_path / "shard.tar").touch()
    assert stamp_of(f"{tmp_path}/shard.tar::a.mp4@512+100").bytes == 100


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_comes_from_the_disk_is_not_read_twice(videos, in_memory):
    trials = trials_of(clips_of(videos / "train"), in_memory=in_memory)
    trials.read(Trial("pyav"), 1)
    if in_memory:
        assert trials.places()[0].position == 0
        return
    assert trials.places()[0].position > 0
    trials.advance(NUM_PLACES)
    assert trials.places()[0].position == 0, "it begins anew before places run out"


def test_numbers_that_are_tried_come_out_even(monkeypatch):
    monkeypatch.setattr(loader_advice, "usable_cores", lambda: 48)
    assert loader_advice.workers_to_try(None, 1) == [1, 2, 4, 8, 16, 32, 48]
    assert loader_advice.workers_to_try(None, 8) == [8, 16, 32, 48]
    assert loader_advice.workers_to_try(None, 64) == [64], "one for each, if there are fewer cores"
    assert loader_advice.workers_to_try([3, 9, 17], 8) == [8, 16]


def test_settings_are_those_of_each_process():
    phases = {"reading": 1, "decoding": 6, "augmenting": 2, "assembling": 0.6, "copying": 0.5}
    trials = [Trial("pyav", {8: 40.0, 16: 100.0}), Trial("decord", {32: 101.0})]
    setting, rate = loader_advice.choose_setting(trials, 0.5)
    assert (setting, rate) == (("pyav", 16), 100.0)
    advice = loader_advice.recommend(setting, 100.0, phases, 8)
    assert "take data.decoder=pyav data.workers=2 for each of 8 processes, 16 in all: 100" in advice
    assert "may be higher" in advice
    assert "the bottleneck is decoding" in advice, "with 2 workers to each process"
    advice = loader_advice.recommend(setting, 100.0, phases, 1)
    assert "data.workers=16: 100.0 clips/s\nthe bottleneck is assembling" in advice


def write_run(folder, starts, lines):
    folder.mkdir()
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    written = [
        {"kind": "train", "update": u, "clips_per_second": c, "data_wait": w} for u, c, w in lines
    ]
    text = "".join(json.dumps(line) + "\n" for line in written)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "validation", "update": 1}\n{"ki')


def test_the_speed_of_a_run_is_that_of_each_process_without_waiting(tmp_path):
    starts = [{"first_update": 0, "processes": 8}, {"first_update": 20, "processes": 16}]
    lines = [(10, 400.0, 0.5), (20, 800.0, 0.0), (30, 800.0, 0.5)]
    write_run(tmp_path / "run", starts, lines)
    assert loader_advice.past_speed(tmp_path / "run") == (16, 100.0)
    assert loader_advice.past_speed(tmp_path) is None


def test_one_process_for_each_gpu_but_no_more_than_the_run_had(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for device, expected in (("cuda", [8, 2, 8]), ("cpu", [1, 2, 16])):
        found = [loader_advice.processes_here(torch.device(device), n) for n in (None, 2, 16)]
        assert found == expected


def test_the_tool_tells_what_several_processes_take_and_gpus_need(labelled_videos, bench, tmp_path):
    config = tmp_path / "finetune.yaml"
    folders = {name: labelled_videos / name for name in ("train", "validation")}
    recipe = "init_weights: null\naugmentation: {{rand_augment: null}}\n"
    config.write_text((CLASSIFIER + recipe + ENGINE).format(**folders))
    arguments = ("--seconds", "0.05", "--workers", "2", "--clips", "3", "--processes", "2")
    decoder = ("--decoders", available_decoders()[0], "--needs", "1e9")
    code, output = bench("loader", config, *arguments, *decoder)
    assert code == 0, output
    assert "training processes: 2, cores: " in output
    assert re.search(
        r"^take data.decoder=\w+ data.workers=1 for each of 2 processes, 2 in all: ", output, re.M
    )
    assert "fit into memory" in output
    assert "would wait for data 100% of" in output


def test_gpus_wait_where_they_train_faster():
    assert (
        loader_advice.verdict(700, 420)
        == "the loader gives 700.0 clips/s, the update takes 420.0: 1.7 times what is needed"
    )
    assert loader_advice.verdict(40, 50) == (
        "the loader gives 40.0 clips/s, the update takes 50.0: "
        "it would wait for data 20% of the time"
    )


def test_the_tool_tells_rates_a_recommendation_and_whether_gpus_starve(
    config_file, bench, tmp_path
):
    table = tmp_path / "tables" / "rates.csv"
    for log in ("starts.jsonl", "metrics.jsonl"):
        shutil.copy(RUN / log, tmp_path)
    config = shutil.copy(config_file, tmp_path / "config.yaml")
    arguments = ("--seconds", "0.05", "--workers", "1,2", "--clips", "3", "--output", table)
    code, output = bench("loader", config, *arguments)
    assert code == 0, output
    for phase in ("reading", "decoding", "augmenting", "assembling", "copying"):
        assert re.search(rf"^ *{phase} ", output, re.MULTILINE), phase
    written = [
        row["phase"] or row["decoder"] for row in csv.DictReader(table.read_text().splitlines())
    ]
    assert written == [*available_decoders(), *IN_WORKERS, "assembling", "copying"]
    for decoder in available_decoders():
        rates = re.search(rf"^ *{decoder} +([\d.]+) +([\d.]+)$", output, re.MULTILINE)
        assert rates, output
        assert min(map(float, rates.groups())) > 0
    assert re.search(r"^take data.decoder=\w+ data.workers=[12]: [\d.]+ clips/s$", output, re.M)
    assert "the bottleneck is " in output
    assert "by its log 1 of them would train up to" in output
    assert re.search(r"^the loader gives [\d.]+ clips/s, the update takes [\d.]+: ", output, re.M)


def test_on_a_gpu_without_a_log_the_need_is_measured_and_on_a_cpu_it_is_asked_for(
    config_file, bench, monkeypatch
):
    arguments = ("--seconds", "0.05", "--workers", "1", "--clips", "3", "--decoders", "pyav")
    code, output = bench("loader", config_file, *arguments)
    assert code == 0, output
    assert "--needs=CLIPS says whether" in output
    commands = importlib.import_module("bench_commands")
    task = Pretraining(load_config(PretrainConfig, config_file, []))
    assert commands.rate_of_updates(task, torch.device("cpu"), 4) > 1
    monkeypatch.setattr(commands, "choose_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(commands, "rate_of_updates", lambda *_: 0.5)
    code, output = bench("loader", config_file, *arguments, "--processes", "2")
    assert "on random pixels updates take 1.0 clips/s" in output
    assert "the update takes 1.0: " in output


def test_decoding_is_measured_on_whole_files_at_a_stride_that_they_hold(tmp_path, bench):
    write_video(tmp_path / "a.mp4", [np.zeros((48, 64, 3), np.uint8)] * 20)
    (tmp_path / "list.csv").write_text("path,start,end\na.mp4,0.2,0.4\n")
    arguments = ("--repeats", "1", "--views", "1x1", "--decoders", "pyav")
    code, output = bench("decoding", tmp_path / "list.csv", *arguments)
    assert code == 0, output
    (tmp_path / "list.csv").write_text("path,kept_every\na.mp4,12\n")
    code, output = bench("decoding", tmp_path / "list.csv", *arguments)
    assert code == 2
    assert "a.mp4 holds one of every 12 frames of its video" in output


def test_a_decoder_that_is_not_there_is_refused(config_file, bench):
    code, output = bench("loader", config_file, "--decoders", "ffmpeg")
    assert code == 2
    assert "--decoders: 'ffmpeg' is not one of those that work: " in output
