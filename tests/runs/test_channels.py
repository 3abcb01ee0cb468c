"""Clips with other channels than RGB need only an entry in the registry of decoders."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hpm_video.config.checks import ConfigError
from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data.clips import VideoClips
from hpm_video.data.manifest import read_manifest
from hpm_video.data.transforms import MultiScaleCrop
from hpm_video.decoding.pyav import PyavReader
from hpm_video.decoding.registry import DECODERS, Decoder, choose_decoder, decoder_choices
from hpm_video.files.failures import TooManyBadFiles
from hpm_video.runs.finetuning import finetune
from hpm_video.runs.pretraining import pretrain

GREY = ["data.decoder=grey", "model.channels=1", "data.mean=[0.45]", "data.std=[0.225]"]
CONFIG = """
model:
  encoder: {dim: 16, depth: 1, num_heads: 2}
  patch_size: [2, 8, 8]
data: {num_frames: 4, frame_stride: 1, frame_size: [32, 32], workers: 0}
recipe: {epochs: 1, batch_size: 4, warmup_epochs: 0}
engine: {precision: fp32, threads: 1, device: cpu}
logging: {every_updates: 1, trackers: [jsonl]}
"""


class GreyReader(PyavReader):
    """Gives only the green channel of a video."""

    def _decode(self, indices):
        return super()._decode(indices)[..., 1:2]


@pytest.fixture(autouse=True)
def _grey_is_registered(monkeypatch):
    monkeypatch.setitem(DECODERS, "grey", Decoder(GreyReader, "av", "pip install av"))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def losses_of(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_one_channel_trains_from_the_config(videos, labelled_videos, config_file, tmp_path):
    options = [
        *GREY,
        f"data.train={videos / 'train'}",
        f"data.validation={videos / 'validation'}",
        f"output_dir={tmp_path / 'run'}",
        "model.decoder={dim: 16, depth: 1, num_heads: 2}",
    ]
    run = pretrain(load_config(PretrainConfig, config_file, options))
    assert torch.tensor(losses_of(run)).isfinite().all()
    assert list((run / "pictures").glob("*.png"))
    last = run / "checkpoints" / "last"
    of_one_channel = 2 * 8 * 8
    shapes = [tuple(value.shape) for value in load_file(last / "model.safetensors").values()]
    assert any(of_one_channel in shape for shape in shapes)
    options = [
        *GREY,
        f"data.train={labelled_videos / 'train'}",
        f"data.validation={labelled_videos / 'validation'}",
        f"output_dir={tmp_path / 'classes'}",
        f"init_weights={last}",
        "augmentation.rand_augment=null",
        "recipe.batch_size=2",
    ]
    run = finetune(load_config(FinetuneConfig, config_file, options))
    assert torch.tensor(losses_of(run)).isfinite().all()


def test_a_reader_is_known_by_its_entry():
    assert decoder_choices() == ("auto", "pyav", "torchcodec", "decord", "grey")
    assert choose_decoder("grey") == "grey"


def test_a_reader_of_other_channels_is_named(videos, config_file):
    config = load_config(PretrainConfig, config_file, ["data.decoder=grey"])
    manifest = read_manifest(videos / "validation")
    clips = VideoClips(manifest, config.data, MultiScaleCrop(flip=False), seed=0)
    with pytest.raises(TooManyBadFiles, match="its frames have 1 channels, and data.mean has val"):
        clips[0]


@pytest.mark.parametrize(
    ("schema", "key", "message"),
    [
        (FinetuneConfig, "data.repeats=1", "take augmentation.rand_augment=null"),
        (
            PretrainConfig,
            "mining={target: clip, feature_weights: x}",
            "target=clip needs model.channels=3",
        ),
    ],
)
def test_what_sees_colours_is_refused(config_file, schema, key, message):
    with pytest.raises(ConfigError, match=message):
        load_config(schema, config_file, [*GREY[1:], key])
