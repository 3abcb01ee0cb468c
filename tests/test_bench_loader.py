"""Not the rates themselves, which are this machine's: that they are told, and what follows."""

import json
import re
import time
from dataclasses import replace

import pytest
import torch

from hpm_video.data.benchmark import Phases, clips_per_second, time_phases
from hpm_video.data.dataset import ClipSpec, Repeats, VideoClips
from hpm_video.data.decode import available_decoders
from hpm_video.data.manifest import read_manifest
from hpm_video.data.mixture import MixedClips, Place
from hpm_video.data.transforms import ClipTransform, MultiScaleCrop


class Slow(ClipTransform):
    """A crop that takes its time."""

    def draw(self, size, frame_size, draw):
        drawn = MultiScaleCrop(flip=False).draw(size, frame_size, draw)

        class SlowCrop:
            box = drawn.box

            def __call__(self, pixels):
                time.sleep(0.05)
                return drawn(pixels)

        return SlowCrop()


CROP = MultiScaleCrop(flip=False)


def clips_of(folder, transform=CROP, count=1):
    stream = VideoClips(
        read_manifest(folder),
        ClipSpec(4, 1, None, (16, 16)),
        transform,
        repeats=Repeats(count, same_frames=False),
        decoder="auto",
        seed=0,
        max_bad_share=0.5,
    )
    return MixedClips([stream])


def places(count):
    return [Place(0, position) for position in range(count)]


def test_time_is_put_down_to_its_phase_and_counted_per_clip(videos):
    cpu = torch.device("cpu")
    for count in (1, 2):
        slow = time_phases(
            clips_of(videos / "train", Slow(), count), places(6), batch_size=4, device=cpu
        )
        assert 0.05 <= slow.augmenting < 0.2
        assert slow.bottleneck(1) == "augmenting"
        assert slow.copying == 0.0
        assert min(slow.reading, slow.decoding, slow.collating) > 0


def test_the_bottleneck_depends_on_the_number_of_workers():
    phases = Phases(reading=1, decoding=6, augmenting=2, collating=0.5, copying=1)
    assert [phases.bottleneck(workers) for workers in (1, 5, 7, 100)] == [
        *("decoding", "decoding", "copying", "copying")
    ]
    assert replace(phases, reading=7).bottleneck(1) == "reading"


def test_a_rate_is_that_of_the_clips(videos):
    rate = clips_per_second(
        clips_of(videos / "train", count=2),
        places(4000),
        batch_size=4,
        workers=1,
        seconds=1.0,
    )
    assert rate > 1


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
