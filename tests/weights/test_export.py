"""Exported models compute the same in their target library, and can be imported again unchanged."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hpm_video.config.loading import load_config, save_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.data.transforms import view_crops
from hpm_video.files.single_file import as_folder
from hpm_video.files.weights import CheckpointError
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.recognition.trained_model import TrainedModel, open_trained
from hpm_video.tokens.patches import normalise
from hpm_video.weights.exporting import ENDINGS, export
from hpm_video.weights.express import express
from hpm_video.weights.geometry import Overrides
from hpm_video.weights.importing import import_weights, texts_of, write_folder
from hpm_video.weights.verify import NOT_ASKED

NAMES = ("red", "green", "blue")
CLIPS = """
model:
  encoder: {dim: 48, depth: 2, num_heads: 4}
  decoder: {dim: 24, depth: 1, num_heads: 2}
  patch_size: [2, 8, 8]
data: {num_frames: 4, frame_stride: 3, frame_size: [32, 32]}
recipe: {epochs: 1, batch_size: 2, warmup_epochs: 0, average_momentum: 0.9}
"""
IMAGES = """
model:
  encoder: {dim: 48, depth: 2, num_heads: 4}
  decoder: {dim: 24, depth: 1, num_heads: 2}
  patch_size: [1, 8, 8]
  positions: space_time
  class_token: true
  conventions: mae
data: {num_frames: 1, frame_stride: 1, frame_size: [32, 32], interpolation: bicubic,
       validation_short_side: 37, crop: random_resized}
masking: {ratio: 0.75}
mining: {target: joint}
recipe: {epochs: 1, batch_size: 2, warmup_epochs: 0}
"""
OF_PRETRAINING = ("  decoder: {dim: 24, depth: 1, num_heads: 2}\n", ", crop: random_resized")
OF_CLASSIFIERS = ", average_momentum: 0.9"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def of_classifier(text):
    for line in OF_PRETRAINING:
        text = text.replace(line, "")
    lines = [line for line in text.splitlines() if not line.startswith(("masking", "mining"))]
    return "\n".join(lines) + "\n"


def load_model(path, weights=None):
    return open_trained(path, TrainedModel, weights)


def overrides_for(model):
    """Options for importing a file that says little about its model."""
    config, data = model.config, model.config.data
    decoder = model.pretraining and config.model.decoder
    return Overrides(
        heads=config.model.encoder.num_heads,
        decoder=decoder,
        decoder_heads=decoder and decoder.num_heads,
        num_frames=data.num_frames,
        frame_size=data.frame_size,
    )


@pytest.fixture
def checkpoint(tmp_path):
    """Make a checkpoint folder with large random weights."""

    def make(kind, *overrides, classifier=False):
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        text = {"clips": CLIPS, "images": IMAGES}[kind]
        text = text if classifier else text.replace(OF_CLASSIFIERS, "")
        (folder / "config.yaml").write_text(of_classifier(text) if classifier else text)
        schema = FinetuneConfig if classifier else PretrainConfig
        config = load_config(schema, folder / "config.yaml", list(overrides))
        save_config(config, folder / "config.yaml")
        if classifier:
            (folder / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
        names = ("model", "average") if classifier else ("model", "teacher")
        for seed, name in enumerate(names):
            model = build_classifier(config, len(NAMES)) if classifier else build_student(config)
            generator = torch.Generator().manual_seed(seed)
            state = {
                key: torch.randn(value.shape, generator=generator).mul(0.2).abs()
                if "running_var" in key
                else 0.2 * torch.randn(value.shape, generator=generator)
                for key, value in model.state_dict().items()
                if value.is_floating_point()
            }
            rest = {key: value for key, value in model.state_dict().items() if key not in state}
            save_file(state | rest, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps({"update": 7}))
        return folder

    return make


CASES = {
    "clips": ("clips", (), False),
    "clips raw": ("clips", ("mining.target=raw",), False),
    "clips classifier": ("clips", (), True),
    "clips classifier rectangular": ("clips", ("data.frame_size=[16,32]",), True),
    "images": ("images", (), False),
    "images wide": ("images", ("model.encoder.mlp_dim=100", "model.decoder.mlp_dim=50"), False),
    "clips wide": ("clips", ("model.encoder.mlp_dim=100", "model.decoder.mlp_dim=50"), False),
    "images in sequence": ("images", ("model.positions=sequence",), False),
    "images without a token": ("images", ("model.class_token=false",), False),
    "images without a token classifier": ("images", ("model.class_token=false",), True),
    "images larger than before": ("images", ("model.pretrained_grid=[1,2,3]",), True),
    "rectangular images": ("images", ("data.frame_size=[32,16]",), True),
    "rectangular images on token": (
        "images",
        ("data.frame_size=[32,16]", "model.pooling=class_token"),
        True,
    ),
    "images classifier": ("images", (), True),
    "images classifier on token": ("images", ("model.pooling=class_token",), True),
}
EXPORTS = [
    *[(case, to) for case in ("clips", "clips classifier") for to in ("transformers", "videomae")],
    ("clips classifier rectangular", "transformers"),
    ("clips classifier rectangular", "videomae"),
    ("clips raw", "transformers"),
    *[("images", to) for to in ("transformers", "timm", "mae")],
    *[("images classifier", to) for to in ("timm", "mae")],
    *[("images classifier on token", to) for to in ("transformers", "timm", "mae")],
    *[("images wide", to) for to in ("transformers", "timm")],
    ("clips wide", "transformers"),
    *[
        (f"images {what}", "timm")
        for what in (
            "in sequence",
            "without a token",
            "without a token classifier",
            "larger than before",
        )
    ],
    *[("rectangular images", to) for to in ("timm", "mae")],
    *[("rectangular images on token", to) for to in ("transformers", "mae")],
]
SAYS = {
    "transformers": ("tokens", "hidden patches"),
    "videomae": ("tokens", "hidden patches"),
    "mae": ("tokens", "hidden patches"),
    "timm": ("tokens",),
}


def made(checkpoint, case, weights=None):
    kind, overrides, classifier = CASES[case]
    return load_model(checkpoint(kind, *overrides, classifier=classifier), weights)


def needs(to):
    if to == "transformers":
        pytest.importorskip("transformers")
    if to == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)


@pytest.mark.parametrize(("case", "to"), EXPORTS)
def test_exported_models_compute_what_ours_does(checkpoint, tmp_path, case, to):
    needs(to)
    own = made(checkpoint, case)
    out = tmp_path / f"out{ENDINGS[to]}"
    exported = export(own, out, to, 1e-5)
    assert exported.parity.holds
    assert not exported.parity.not_checked
    expected = ("logits",) if own.is_classifier else SAYS[to]
    assert {found.of for found in exported.parity.differences} >= set(expected)
    assert all(found.largest_value > 0.02 for found in exported.parity.differences)
    report = json.loads(
        (
            out / "parity.json" if out.is_dir() else out.with_name(f"{out.name}.parity.json")
        ).read_text()
    )
    assert report["holds"]
    assert report["update"] == 7
    if not own.is_classifier:
        assert any("difficulty_decoder" in name for name in report["left_out"])
    assert not list(tmp_path.glob(".writing*"))


def comes_back(case, to):
    """Whether everything comes back unchanged: folded and filled weights do not."""
    other = ("images wide", "clips wide")
    return case not in other and to != "timm"


@pytest.mark.parametrize(
    ("case", "to"), [(case, to) for case, to in EXPORTS if comes_back(case, to)]
)
def test_what_is_exported_comes_back(checkpoint, tmp_path, case, to):
    """Export, import and export give the same tensors, bit for bit."""
    own = made(checkpoint, case)
    first, second = (tmp_path / f"{name}{ENDINGS[to]}" for name in ("first", "second"))
    export(own, first, to, skip=True)
    imported = import_weights(first, overrides_for(own))
    expected = own.tensors if case.startswith(("images", "rect")) else without_key_bias(own.tensors)
    kept = {name for name in own.tensors if "difficulty_decoder" not in name}
    assert imported.model.tensors.keys() == kept
    for name, value in imported.model.tensors.items():
        assert torch.equal(value, expected[name]), name
    assert not imported.fresh
    assert imported.model.config.model.positions != "given"
    assert imported.model.config.data.clip_size == own.config.data.clip_size
    if to == "transformers":
        assert imported.model.label_names == own.label_names
    if to in ("transformers", "videomae", "mae") and not own.is_classifier:
        assert imported.model.config.mining.target == own.config.mining.target
    write_folder(imported, tmp_path / "imported", NOT_ASKED.as_table())
    again = load_model(tmp_path / "imported")
    assert again.config.data.mean == own.config.data.mean
    assert again.tensors.keys() == kept
    export(again, second, to, skip=True)
    before, after = (weights_in(path) for path in (first, second))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def without_key_bias(tensors):
    found = dict(tensors)
    for name in [name for name in found if name.endswith(".attn.qkv.bias")]:
        query, key, value = found[name].chunk(3)
        assert key.any()
        found[name] = torch.cat([query, 0 * key, value])
    return found


def weights_in(path):
    if path.is_dir():
        return load_file(path / "model.safetensors")
    return torch.load(path, weights_only=True)["model"]


OFFICIAL = {
    "videomae": ("videomae", "transformers"),
    "videomae_classifier": ("videomae", "transformers"),
    "mae": ("mae", "transformers"),
    "vit_classifier": ("mae", "timm", "transformers"),
}


@pytest.fixture
def official(layouts_of, tmp_path):
    """Files of the official projects."""
    of = layouts_of
    encoder, decoder, patch = (48, 2), (24, 1), (2, 8, 8)
    shapes = {
        "videomae": of.videomae(encoder, decoder, patch),
        "videomae_classifier": of.videomae_classifier(encoder, patch, 5),
        "mae": of.mae(encoder, decoder, 8, 16),
        "vit_classifier": {**of.vit(encoder, 8, 16), **of.affine("head", 5, 48)},
    }

    def write(name):
        state = of.fill(shapes[name])
        torch.save({"model": state, "epoch": 3}, tmp_path / "official.pth")
        return state, tmp_path / "official.pth"

    return write


@pytest.mark.parametrize(
    ("name", "to"), [(name, to) for name, all_ in OFFICIAL.items() for to in all_]
)
def test_import_export_import_is_the_identity(official, tmp_path, name, to):
    state, file = official(name)
    given = Overrides(heads=4, decoder_heads=2, num_frames=4, frame_size=(32, 32))
    imported = import_weights(file, given)
    write_folder(imported, tmp_path / "folder", NOT_ASKED.as_table())
    out = tmp_path / f"out{ENDINGS[to]}"
    export(load_model(tmp_path / "folder"), out, to, skip=True)
    again = import_weights(out, given)
    assert again.model.tensors.keys() == imported.model.tensors.keys()
    for key, value in imported.model.tensors.items():
        assert torch.equal(again.model.tensors[key], value), key
    assert again.model.config.model == imported.model.config.model
    assert again.model.config.data.clip_size == imported.model.config.data.clip_size
    assert again.model.label_names == imported.model.label_names
    if to in ("mae", "videomae", "timm"):
        written = weights_in(out)
        assert written.keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(written[key], value), key


@pytest.mark.parametrize("case", ["images", "images classifier", "images classifier on token"])
def test_timm_comes_back(checkpoint, tmp_path, case):
    own = made(checkpoint, case)
    export(own, tmp_path / "timm", "timm", skip=True)
    imported = import_weights(tmp_path / "timm", overrides_for(own))
    assert imported.model.config.data.mean == own.config.data.mean
    for name, value in imported.model.tensors.items():
        if name not in imported.fresh:
            assert torch.equal(value, own.tensors[name]), name
    assert any(name.startswith("reconstructor") for name in imported.fresh) == (case == "images")


def test_files_of_mae_and_videomae_say_what_they_are(checkpoint, tmp_path):
    own = made(checkpoint, "clips raw")
    export(own, tmp_path / "a.pth", "videomae", skip=True)
    imported = import_weights(tmp_path / "a.pth")
    model = imported.model
    assert model.config.data.clip_size == (4, 32, 32)
    assert model.config.data.frame_stride == 3
    assert model.config.model.encoder.num_heads == 4
    assert model.config.model.decoder.num_heads == 2
    assert model.config.mining.target == "raw"
    assert [line.split()[0] for line in imported.assumed] == ["resizing"]


def test_teacher_and_average(checkpoint, tmp_path):
    for kind, other in (("clips", "teacher"), ("clips classifier", "average")):
        first = made(checkpoint, kind)
        own = made(checkpoint, kind, other)
        name = next(iter(own.tensors))
        assert not torch.equal(own.tensors[name], first.tensors[name])
        out = tmp_path / f"{other}.pth"
        assert f"({other} at update 7)" in export(own, out, "videomae").lines[0]
        assert import_weights(out).model.tensors.keys() <= own.tensors.keys()
    with pytest.raises(CheckpointError, match="take --weights model or average"):
        made(checkpoint, "clips classifier", "teacher")


def test_labels_and_pixels_of_a_classifier_in_transformers(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    own = made(checkpoint, "clips classifier")
    export(own, tmp_path / "out", "transformers", skip=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == dict(enumerate(NAMES))
    frames = smooth_frames(4, 168)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = processor(list(frames), return_tensors="pt")["pixel_values"].transpose(1, 2)
    assert_same_pixels(theirs, own, frames)
    of_video = transformers.AutoVideoProcessor.from_pretrained(tmp_path / "out")
    assert tuple(of_video.image_mean) == own.config.data.mean
    assert type(of_video).__name__ == "VideoMAEVideoProcessor"


def test_pixels_of_images_in_transformers(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    own = made(checkpoint, "images classifier on token")
    export(own, tmp_path / "out", "transformers", skip=True)
    frames = smooth_frames(1, 160)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = processor(frames[0], return_tensors="pt")["pixel_values"].unsqueeze(2)
    assert_same_pixels(theirs, own, frames)


def smooth_frames(count, width):
    """Waves, in which resampling changes every pixel: (T, 96, width, C) uint8"""
    t, y, x, c = np.meshgrid(*map(np.arange, (count, 96, width, 3)), indexing="ij")
    return (127 + 120 * np.sin(0.35 * x + 0.21 * y + t + c)).astype(np.uint8)


def assert_same_pixels(theirs, own, frames):
    def ours(short_side, interpolation):
        data = replace(
            own.config.data, validation_short_side=short_side, interpolation=interpolation
        )
        (crop,) = view_crops(frames, data, 1)
        return normalise(crop.unsqueeze(0), own.config.data.mean, own.config.data.std)

    expected = ours(own.config.data.validation_short_side, own.config.data.interpolation)
    assert theirs.shape == expected.shape
    # Their rounding differs by up to one of 256 steps.
    near = (theirs - expected).abs().mean()
    assert near < 0.02
    side = own.config.data.validation_short_side or own.config.data.clip_size[1]
    other = "bilinear" if own.config.data.interpolation == "bicubic" else "bicubic"
    for wrong in (
        ours(side + 2, own.config.data.interpolation),
        ours(own.config.data.validation_short_side, other),
    ):
        assert (theirs - wrong).abs().mean() > 2 * near


REFUSED = {
    "a class token": ("clips", ("model.class_token=true",), False, "transformers", "ViTMAE"),
    "a class token in a file": ("clips", ("model.class_token=true",), False, "videomae", "none of"),
    "positions": (
        "clips",
        ("model.positions=space_time",),
        False,
        "transformers",
        "sequence alone",
    ),
    "positions in a file": (
        "clips",
        ("model.positions=space_time",),
        True,
        "videomae",
        "sequence alone",
    ),
    "other clips": ("clips", ("model.pretrained_grid=[2,8,8]",), True, "transformers", "differs"),
    "a bias": ("clips", ("model.conventions=mae",), False, "videomae", "left over encoder_to_d"),
    "no bias": ("images", ("model.conventions=videomae",), False, "mae", "missing decoder_embed"),
    "no class token": ("images", ("model.class_token=false",), False, "mae", "none of"),
    "features": ("clips", ("mining.target=ema",), False, "videomae", "not of features"),
    "features as wide as a patch": (
        "images",
        ("mining.target=ema", "model.encoder={dim: 192, depth: 2, num_heads: 4}"),
        False,
        "mae",
        "not of features",
    ),
    "clips in timm": ("clips", (), True, "timm", "takes images"),
    "clips in MAE": ("clips", (), False, "mae", "not clips of 4 frames"),
    "clips of other frames": (
        "images",
        ("data.frame_size=[32,16]",),
        False,
        "transformers",
        "no ViTMAEForPreTraining of its sizes",
    ),
    "images of another size": ("images", ("model.pretrained_grid=[1,2,3]",), True, "hpm", "HPM"),
    "patches": ("images", ("model.patch_size=[1,8,16]",), True, "transformers", "patch"),
    "pooling": ("clips", ("model.pooling=attentive",), True, "transformers", "left over attn_pool"),
    "pooling in timm": ("images", ("model.pooling=batch_norm",), True, "timm", "over head_norm"),
    "mean in ViT": ("images", (), True, "transformers", r"missing vit\.layernorm"),
    "pre-training in ONNX": ("clips", (), False, "onnx", "takes classifiers"),
    "no predictor": (
        "images",
        ("mining.predictor=none", "masking.strategy=random"),
        False,
        "hpm",
        "loss predictor",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_the_reason(checkpoint, tmp_path, case):
    kind, overrides, classifier, to, reason = REFUSED[case]
    own = load_model(checkpoint(kind, *overrides, classifier=classifier))
    out = tmp_path / f"out{ENDINGS[to]}"
    with pytest.raises(CheckpointError, match=rf"(?s)cannot become .*{reason}"):
        export(own, out, to)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("to", ["videomae", "transformers"])
def test_a_bias_on_keys_is_left_out_of_videomae(checkpoint, tmp_path, to):
    needs(to)
    own, out = made(checkpoint, "clips classifier"), tmp_path / f"out{ENDINGS[to]}"
    exported = export(own, out, to, 1e-5)
    assert exported.parity.holds
    assert not any(name.endswith(("key.bias", "qkv.bias")) for name in weights_in(out))
    (why,) = {exported.left_out[f"blocks.{i}.attn.qkv.bias"] for i in range(2)}
    assert "a bias on keys" in why


def test_a_bias_on_keys_goes_into_mae(checkpoint, tmp_path):
    own = made(checkpoint, "images")
    exported = export(own, tmp_path / "a.pth", "mae", 1e-5)
    name = "blocks.0.attn.qkv.bias"
    assert own.tensors[name].chunk(3)[1].any()
    assert torch.equal(weights_in(tmp_path / "a.pth")[name], own.tensors[name])
    assert name not in exported.left_out


def test_nothing_is_overwritten(checkpoint, tmp_path):
    own = made(checkpoint, "clips classifier")
    out = tmp_path / "a.pth"
    export(own, out, "videomae", skip=True)
    before = out.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        export(own, out, "videomae", skip=True)
    out.unlink()
    with pytest.raises(CheckpointError, match=r"a\.pth\.parity\.json exists already"):
        export(own, out, "videomae", skip=True)
    out.write_bytes(before)
    with pytest.raises(CheckpointError, match=r"file that ends in \.pth, got .*b\.bin"):
        export(own, tmp_path / "b.bin", "videomae", skip=True)


@pytest.mark.parametrize(
    ("case", "to"), [("clips", "videomae"), ("images", "timm"), ("clips", "transformers")]
)
def test_a_difference_above_the_tolerance_fails_and_leaves_nothing(
    checkpoint, tmp_path, monkeypatch, case, to
):
    needs(to)
    own = made(checkpoint, case)
    wrong = own.tensors
    wrong["blocks.0.mlp.fc1.bias"] += 0.01

    def express_wrongly(own, to):
        return express(replace(own, held=wrong), to)

    monkeypatch.setattr("hpm_video.weights.exporting.express.express", express_wrongly)
    with pytest.raises(
        CheckpointError, match="(?s)output differs from our.*largest difference.*the tolerance"
    ):
        export(own, tmp_path / f"out{ENDINGS[to]}", to)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def without(monkeypatch, library):
    original = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == library else original(name)
    )


@pytest.mark.parametrize(("to", "library"), [("transformers", "transformers"), ("onnx", "onnx")])
def test_a_format_tells_what_to_install(checkpoint, tmp_path, monkeypatch, to, library):
    without(monkeypatch, library)
    with pytest.raises(CheckpointError, match=f"pip install {library}"):
        export(made(checkpoint, "clips classifier"), tmp_path / f"a{ENDINGS[to]}", to)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("clips", ()),
        ("clips", ("model.pooling=attentive", "model.positions=space_time")),
        ("images", ("model.pooling=batch_norm",)),
    ],
)
def test_onnx_of_any_classifier_and_any_number_of_clips(checkpoint, tmp_path, kind, overrides):
    needs("onnx")
    import onnx

    own = load_model(checkpoint(kind, *overrides, classifier=True))
    exported = export(own, tmp_path / "a.onnx", "onnx", 1e-5)
    compared = {found.of for found in exported.parity.differences}
    assert compared == {"logits"}
    program = onnx.load(tmp_path / "a.onnx")
    metadata = {entry.key: entry.value for entry in program.metadata_props}
    assert json.loads(metadata["labels"]) == list(NAMES)
    clips = json.loads(metadata["clips"])
    assert (clips["num_frames"], clips["input_size"]) == (own.config.data.num_frames, 32)


@pytest.mark.parametrize(
    ("kind", "overrides", "classifier"),
    [
        ("clips", ("mining.target=ema",), False),
        ("clips", ("model.class_token=true", "model.conventions=mae"), False),
        ("images", ("model.pooling=attentive",), True),
        ("images", ("model.pooling=batch_norm",), True),
    ],
)
def test_one_file_takes_every_model_and_comes_back(
    checkpoint, tmp_path, kind, overrides, classifier
):
    folder = checkpoint(kind, *overrides, classifier=classifier)
    own = load_model(folder)
    own, texts = replace(own, held=own.tensors), texts_of(own)
    file, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert export(own, file, "file", 0.0).parity.holds
    shutil.rmtree(folder)
    back = load_model(file)
    assert back.tensors.keys() == own.tensors.keys()
    assert all(torch.equal(back.tensors[name], own.tensors[name]) for name in own.tensors)
    assert texts_of(back) == texts
    export(back, again, "file", 0.0)
    back.encoder()
    for name, value in load_file(again).items():
        assert torch.equal(value, own.tensors[name])


def test_one_file_of_the_average_is_tested_with_it(checkpoint, tmp_path):
    own = made(checkpoint, "clips classifier", "average")
    export(own, tmp_path / "a.safetensors", "file")
    assert load_model(tmp_path / "a.safetensors").weights == "average"


def test_weights_alone_are_no_single_file(checkpoint, tmp_path):
    folder = checkpoint("clips", classifier=True)
    with (
        pytest.raises(CheckpointError, match="(?s)weights without the config.*--to file"),
        as_folder(folder / "model.safetensors"),
    ):
        pass
    with as_folder(folder) as same:
        assert same == folder


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_official_hpm_has_student_teacher_and_a_head_of_all_values(checkpoint, tmp_path, weights):
    pytest.importorskip("transformers")
    folder = checkpoint("images")
    own = load_model(folder, weights)
    exported = export(own, tmp_path / "hpm.pth", "hpm", 1e-5)
    assert "difficulty" in {found.of for found in exported.parity.differences}
    assert "of the teacher: difficulty" in {found.of for found in exported.parity.differences}
    content = torch.load(tmp_path / "hpm.pth", weights_only=True)
    head = content["state_dict"]["module.decoder_pred_losspred.weight"]
    assert head.shape == (8 * 8 * 3, 24)
    assert torch.equal(head, own.tensors["difficulty_decoder.head.weight"].expand_as(head))
    assert all(name.startswith("module.") for name in content["state_dict"])
    again = import_weights(tmp_path / "hpm.pth", overrides_for(own))
    assert again.model.config.mining.predictor == "relative"
    for found, expected in (
        (again.model.tensors, own.tensors),
        (again.teacher, load_file(folder / "teacher.safetensors")),
    ):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    (folder / "teacher.safetensors").unlink()
    if weights == "student":
        assert export(load_model(folder), tmp_path / "alone.pth", "hpm", 1e-5).parity.holds


def test_given_positions_go_out_and_come_back(checkpoint, tmp_path):
    own = load_model(checkpoint("images", "model.positions=given", classifier=True))
    for to in ("timm", "mae"):
        out = tmp_path / f"{to}{ENDINGS[to]}"
        assert export(own, out, to, 1e-5).parity.holds
        imported = import_weights(out, overrides_for(own))
        assert imported.model.config.model.positions == "given"
        for name, value in own.tensors.items():
            assert torch.equal(imported.model.tensors[name], value), name
    with pytest.raises(CheckpointError, match="cannot become"):
        export(own, tmp_path / "a.pth", "videomae")


def test_the_licence_of_imported_weights_goes_along(checkpoint, tmp_path):
    folder = checkpoint("clips", classifier=True)
    (folder / "origin.json").write_text(
        json.dumps({"licence": "of a friend", "source": "x", "family": "mae", "epoch": 3})
    )
    exported = export(load_model(folder), tmp_path / "a.safetensors", "file")
    assert "licence: of a friend" in exported.lines
    assert exported.files[1].name == "a.safetensors.parity.json"
    assert json.loads(exported.files[1].read_text())["licence"] == "of a friend"
    again = export(load_model(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "file")
    assert "licence: of a friend" in again.lines


def test_the_command_line(checkpoint, run_tool, tmp_path, videos):
    folder = checkpoint("clips", "data.frame_stride=1", classifier=True)
    file = tmp_path / "model.safetensors"
    code, output = run_tool("weights", "export", folder, file, "--to", "file")
    assert code == 0, output
    assert "parity with hpm_video 0" in output
    shutil.move(folder, tmp_path / "elsewhere")
    video = next((videos / "validation").iterdir())
    of_file = run_tool("predict", file, video, "--views", "1x1", "--workers", 0)
    of_folder = run_tool("predict", tmp_path / "elsewhere", video, "--views", "1x1", "--workers", 0)
    assert of_file[0] == 0, of_file[1]
    assert of_file == of_folder
    code, output = run_tool("weights", "export", file, file, "--to", "file")
    assert code == 2
    assert "exists already" in output
    code, output = run_tool("weights", "export", file, tmp_path / "a", "--to", "timm")
    assert code == 2
    assert f"{file} cannot become what --to timm writes" in output
    assert "Traceback" not in output
