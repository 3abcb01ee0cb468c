"""Not the rates themselves, which are this machine's: that they are told, and what follows."""

import importlib.util
import json
import os
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from hpm_video.config.data import DataConfig
from hpm_video.data.clips import VideoClips
from hpm_video.data.manifest import read_manifest
from hpm_video.data.mixture import MixedClips, Place
from hpm_video.data.transforms import ClipTransform, MultiScaleCrop
from hpm_video.decoding.registry import DecodeError, available_decoders
from hpm_video.files.failures import Failure
from hpm_video.preparation.benchmark import (
    MIB,
    Phases,
    RefusedFiles,
    Storage,
    Trial,
    storage_of,
    time_phases,
    try_reading,
)
from hpm_video.workers.room import RoomError

pytestmark = pytest.mark.slow

TAKEN = 0.05


@pytest.fixture(scope="module")
def bench_loader():
    """The tool as a module."""
    place = Path(__file__).parents[2] / "tools/bench_loader.py"
    spec = importlib.util.spec_from_file_location("bench_loader", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Slow(ClipTransform):
    """A crop that takes its time, by a clock."""

    def __init__(self, clock):
        self.clock = clock

    def draw(self, size, frame_size, draw):
        drawn = MultiScaleCrop(flip=False).draw(size, frame_size, draw)
        clock = self.clock

        class SlowCrop:
            box = drawn.box

            def __call__(self, pixels):
                clock.now += TAKEN
                return drawn(pixels)

        return SlowCrop()


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
    return MixedClips([stream])


def places(count):
    return [Place(0, position) for position in range(count)]


class Clock:
    """A millisecond passes between two looks at it, and what is added."""

    now = 0.0

    def perf_counter(self):
        self.now += 1e-3
        return self.now

    monotonic = perf_counter


def test_time_is_put_down_to_its_phase_and_counted_per_clip(videos, monkeypatch):
    cpu, clock = torch.device("cpu"), Clock()
    monkeypatch.setattr("hpm_video.preparation.benchmark.time", clock)
    for count in (1, 2):
        slow = time_phases(
            clips_of(videos / "train", Slow(clock), count), places(6), batch_size=4, device=cpu
        )
        assert slow.augmenting == pytest.approx(TAKEN + 1e-3), "of each clip, not of each video"
        assert slow.bottleneck(1) == "augmenting"
        assert slow.copying == 0.0
        assert min(slow.reading, slow.decoding, slow.collating) > 0


def test_the_bottleneck_depends_on_the_number_of_workers():
    phases = Phases(reading=1, decoding=6, augmenting=2, collating=0.5, copying=1)
    assert [phases.bottleneck(workers) for workers in (1, 5, 7, 100)] == [
        "decoding",
        "decoding",
        "copying",
        "copying",
    ]
    assert replace(phases, reading=7).bottleneck(1) == "reading"


def test_a_rate_is_that_of_the_clips(videos):
    trial = try_reading(
        clips_of(videos / "train", count=2),
        places(4000),
        batch_size=4,
        workers=1,
        seconds=1.0,
    )
    assert trial.rate > 1
    assert 0 < trial.reached <= 4000
    assert trial.read <= set(map(str, (videos / "train").iterdir()))
    assert not trial.refused


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
    for memory in (None, 2**40):
        storage = Storage(5, 1, memory)
        cpu = torch.device("cpu")
        phases = time_phases(clips, places(5), batch_size=2, device=cpu, storage=storage)
        assert phases.decoding > 0
    clips = clips_of(manifest_of(tmp_path, tmp_path / "gone.mp4"))
    with pytest.raises(DecodeError, match=r"none of the first 1 files decodes.*gone\.mp4"):
        time_phases(clips, places(1), batch_size=2, device=torch.device("cpu"))


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
    (stream,) = clips.streams
    reader = stream.reader
    options = {"batch_size": 2, "workers": 1, "seconds": 0.1}
    with pytest.raises(RefusedFiles, match="files do not decode") as caught:
        try_reading(clips, places(400), **options, decoder="decord")
    assert Path(caught.value.first.path).parent == transport_streams
    assert stream.reader is reader
    assert stream.bad == {}
    assert try_reading(clips, places(400), **options, decoder="pyav").rate > 0


@needs_both
@pytest.mark.parametrize("configured", ["decord", "pyav"])
def test_a_decoder_that_refuses_the_files_is_told_and_the_others_go_on(
    config_file, transport_streams, run_tool, configured
):
    arguments = ("--seconds", "0.2", "--workers", "1", "--clips", "3", "--decoders", "decord,pyav")
    data = (f"data.train={transport_streams}", f"data.decoder={configured}")
    code, output = run_tool("bench_loader", config_file, *data, *arguments)
    assert code == 0, output
    assert re.search(r"^one clip, by pyav ", output, re.M), output
    assert re.search(r"^  decord .*refuses these files, such as .*\.ts: ", output, re.M), output
    assert re.search(r"^  pyav +[\d.]+$", output, re.M), output
    assert "take data.decoder=pyav data.workers=1" in output


@needs_both
def test_where_all_decoders_refuse_the_files_it_is_a_wrong_input(
    config_file, transport_streams, run_tool
):
    arguments = ("--seconds", "0.2", "--workers", "1", "--clips", "3", "--decoders", "decord")
    code, output = run_tool(
        "bench_loader", config_file, f"data.train={transport_streams}", *arguments
    )
    assert code == 2
    assert "Traceback" not in output
    assert "error: none of the first 3 files decodes" in output


class Refusing:
    """Trials in which a decoder refuses some files, or there is no room."""

    def __init__(self, clips, outcomes):
        self.clips, self.outcomes = clips, outcomes

    def measure(self, decoder, workers):
        outcome = self.outcomes[decoder, workers]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def test_a_decoder_that_refuses_too_many_of_the_files_it_tried_is_not_recommended(
    videos, bench_loader, capsys
):
    def trial(rate, refused):
        files = {str(number) for number in range(20 - refused)}
        return Trial(
            rate, 20, files, {f"bad {n}": Failure(f"bad {n}", "no") for n in range(refused)}
        )

    clips = clips_of(videos / "train")  # of which half may be bad
    trials = Refusing(
        clips,
        {
            ("pyav", 1): trial(5.0, 10),
            ("pyav", 2): RoomError("too small"),
            ("decord", 1): trial(50.0, 11),
            ("decord", 2): trial(60.0, 11),
        },
    )
    assert bench_loader.try_all(trials, ["pyav", "decord"], [1, 2]) == {("pyav", 1): 5.0}
    output = capsys.readouterr().out
    assert re.search(r"^  pyav +5.0 +no room  refuses 10 of 20 files, such as bad 0$", output, re.M)
    assert re.search(r"^  decord +50.0 +60.0  refuses 11 of 20 files", output, re.M)
    everywhere = Refusing(clips, dict.fromkeys(trials.outcomes, RoomError("too small")))
    with pytest.raises(RoomError, match="too small"):
        bench_loader.try_all(everywhere, ["pyav", "decord"], [1, 2])


def test_it_is_told_where_files_are_read_from_and_why(videos):
    storage = storage_of(clips_of(videos / "train"))
    files = [*(videos / "train").iterdir()]
    assert storage.num_files == len(files)
    assert storage.num_bytes == sum(file.stat().st_size for file in files)
    small, large = (Storage(3, 100 * MIB, memory) for memory in (201 * MIB, 199 * MIB))
    assert small.is_memory
    assert not large.is_memory
    assert str(small).startswith("3 files of about 100 MiB fit into memory: they are read from the")
    assert str(large).startswith("3 files of about 100 MiB may not fit into memory: they are read")
    assert not Storage(3, 1, None).is_memory


@pytest.mark.parametrize("memory", [0, 2**40])
def test_files_are_where_training_finds_them(videos, tmp_path, monkeypatch, memory):
    source = next((videos / "train").iterdir())
    shutil.copy(source, tmp_path / "a.mp4")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]))
    clips = clips_of(tmp_path)
    Storage(1, 1, memory).prepare_all(clips, places(3))
    Storage(1, 1, memory).prepare(f"{tmp_path}/shard.tar::a.mp4@512+100")  # there is none
    (tmp_path / "shard.tar").write_bytes(bytes(2048))
    Storage(1, 1, memory).prepare(f"{tmp_path}/shard.tar::a.mp4@512+100")
    forgotten = [(0, 0, os.POSIX_FADV_DONTNEED)] * 3 + [(512, 100, os.POSIX_FADV_DONTNEED)]
    assert asked == ([] if memory else forgotten)


@pytest.mark.parametrize("memory", [0, 2**40])
def test_what_comes_from_the_disk_is_not_read_twice(videos, bench_loader, memory):
    clips = clips_of(videos / "train")
    trials = bench_loader.Trials(clips, [1.0], Storage(1, 1, memory), batch_size=4, seconds=0.1)
    trials.measure("pyav", 1)
    if memory:
        assert trials.places()[0].position == 0
        return
    assert trials.places()[0].position > 0
    trials.go_on(bench_loader.NUM_PLACES)
    assert trials.places()[0].position == 0, "it begins anew before places run out"


def test_numbers_that_are_tried_come_out_even(bench_loader, monkeypatch):
    monkeypatch.setattr(bench_loader, "cores", lambda: 48)
    assert bench_loader._tried(None, 1) == [1, 2, 4, 8, 16, 32, 48]
    assert bench_loader._tried(None, 8) == [8, 16, 32, 48]
    assert bench_loader._tried(None, 64) == [64], "one for each, where there are fewer cores"
    assert bench_loader._tried([3, 9, 17], 8) == [8, 16]


def test_settings_are_those_of_each_process(bench_loader, capsys):
    phases = Phases(reading=1, decoding=6, augmenting=2, collating=0.5, copying=0.5)
    rates = {("pyav", 8): 40.0, ("pyav", 16): 100.0, ("decord", 32): 101.0}
    assert bench_loader.recommend(rates, phases, 8) == ("pyav", 16)
    output = capsys.readouterr().out
    assert (
        "take data.decoder=pyav data.workers=2 for each of 8 processes, 16 in all: 100.0 cl"
        in output
    )
    assert "more may come" in output
    assert "the bottleneck is decoding" in output, "with 2 workers to each process"
    bench_loader.recommend(rates, phases, 1)
    output = capsys.readouterr().out
    assert "data.workers=16: 100.0 clips/s\nthe bottleneck is collating" in output


def write_run(folder, starts, lines):
    folder.mkdir()
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    written = [
        {"kind": "train", "update": u, "clips_per_second": c, "data_wait": w} for u, c, w in lines
    ]
    text = "".join(json.dumps(line) + "\n" for line in written)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "validation", "update": 1}\n{"ki')


def test_needs_are_those_of_this_machine_alone(bench_loader, tmp_path):
    starts = [{"first_update": 0, "processes": 8}, {"first_update": 20, "processes": 16}]
    lines = [(10, 400.0, 0.5), (20, 800.0, 0.0), (30, 800.0, 0.5)]
    write_run(tmp_path / "run", starts, lines)
    past = bench_loader.PastRun.read(tmp_path / "run")
    assert past.processes == 16
    assert past.needs(16) == 1600.0
    assert past.needs(8) == 800.0, "one of two machines"
    assert past.told(8).startswith("the run had 16 processes; 8 such train up to 800.0 clips/s")
    cpu = torch.device("cpu")
    assert bench_loader.processes_here(cpu, past) == 16
    assert bench_loader.processes_here(cpu, bench_loader.PastRun()) == 1


def test_needs_of_a_run_that_does_not_tell_its_processes(bench_loader, tmp_path):
    write_run(tmp_path / "old", [{"first_update": 0}], [(10, 400.0, 0.5)])
    past = bench_loader.PastRun.read(tmp_path / "old")
    assert past.needs(4) == 800.0
    assert past.told(4).startswith("the run trained up to 800.0 clips/s")
    assert bench_loader.PastRun.read(tmp_path).needs(4) is None


def test_one_process_for_each_gpu_but_no_more_than_the_run_had(bench_loader, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    gpu = torch.device("cuda")
    found = [
        bench_loader.processes_here(gpu, bench_loader.PastRun(count)) for count in (None, 2, 16)
    ]
    assert found == [8, 2, 8]


def test_the_tool_tells_what_several_processes_take(config_file, run_tool):
    arguments = ("--seconds", "0.2", "--workers", "2", "--clips", "3", "--processes", "2")
    decoder = ("--decoders", available_decoders()[0])
    code, output = run_tool("bench_loader", config_file, *arguments, *decoder)
    assert code == 0, output
    assert "for 2 processes that train" in output
    assert re.search(
        r"^take data.decoder=\w+ data.workers=1 for each of 2 processes, 2 in all: ", output, re.M
    )
    assert "fit into memory" in output


def test_the_tool_tells_rates_a_recommendation_and_whether_gpus_starve(finished_run, run_tool):
    arguments = ("--seconds", "0.3", "--workers", "1,2", "--clips", "6")
    code, output = run_tool("bench_loader", finished_run / "config.yaml", *arguments)
    assert code == 0, output
    for phase in ("reading", "decoding", "augmenting", "collating", "copying"):
        assert re.search(rf"^  {phase}", output, re.MULTILINE), phase
    for decoder in available_decoders():
        rates = re.search(rf"^  {decoder} +([\d.]+) +([\d.]+)$", output, re.MULTILINE)
        assert rates, output
        assert min(map(float, rates.groups())) > 0
    assert re.search(r"^take data.decoder=\w+ data.workers=[12]: [\d.]+ clips/s$", output, re.M)
    assert "the bottleneck is " in output
    lines = map(json.loads, (finished_run / "metrics.jsonl").read_text().splitlines())
    speeds = [line["clips_per_second"] for line in lines if line["kind"] == "train"]
    assert speeds
    assert re.search(r"GPUs that (could )?train [\d.]+ clips/s", output), "it knows the run's need"


@pytest.mark.parametrize(
    ("needs", "words"), [("0.001", "enough for GPUs"), ("1e9", "would wait for data 100% of")]
)
def test_what_gpus_need_can_be_said(finetuned_run, run_tool, needs, words):
    arguments = ("--seconds", "0.2", "--workers", "1", "--clips", "3", "--needs", needs)
    decoder = ("--decoders", available_decoders()[0])
    code, output = run_tool("bench_loader", finetuned_run / "config.yaml", *arguments, *decoder)
    assert code == 0, output
    assert words in output


def test_a_decoder_that_is_not_there_is_refused(finished_run, run_tool):
    arguments = ("--clips", "2", "--decoders", "ffmpeg")
    code, output = run_tool("bench_loader", finished_run / "config.yaml", *arguments)
    assert code == 2
    assert "--decoders: ffmpeg is not there, only " in output
