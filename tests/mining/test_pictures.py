import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from geometry import Geometry
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Linear

from hpm_video.config.choices import TransformerSize
from hpm_video.config.data import PretrainDataConfig
from hpm_video.config.loading import save_config
from hpm_video.config.mining import MaskingConfig
from hpm_video.config.model import ModelConfig
from hpm_video.config.schema import PretrainConfig, SourceConfig
from hpm_video.data.batch import ClipBatch
from hpm_video.mining import pictures, study
from hpm_video.mining.objective import HardPatchesMining
from hpm_video.mining.pictures import (
    draw_animation,
    draw_sheet,
    make_panels,
    save_sheet,
    to_ranks,
    write_pictures,
)
from hpm_video.mining.study import Study, reconstruct, statistics_from_visible, study_clips
from hpm_video.mining.targets import FeatureTarget, PixelTarget
from hpm_video.models.from_config import build_student
from hpm_video.models.masked_autoencoder import MaskedAutoencoder, Prediction
from hpm_video.preparation.encode import write_video
from hpm_video.randomness import uniform
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.masking import STRATEGIES, MaskRule, TokenMask, count_masked
from hpm_video.tokens.patches import TargetKind, patchify
from hpm_video.training.ema import MomentumSchedule
from hpm_video.training.engine import TorchEngine

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY = TransformerSize(32, 1, 2)
PATCH: Size3 = (2, 8, 8)
VIDEO: Size3 = (4, 16, 24)
KINDS: tuple[TargetKind, ...] = ("raw", "joint", "per_channel")


def make_batch(size: Size3 = VIDEO, clips: int = 1, channels: int = 3) -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (clips, channels, *size), generator=generator, dtype=torch.uint8)
    return ClipBatch(
        clips=pixels,
        keys=torch.arange(clips) + 5,
        labels=torch.full((clips,), -1),
        files=tuple(f"some folder/clip {i}.mp4" for i in range(clips)),
        failures=(),
    )


def make_objective(
    size: Size3 = VIDEO,
    patch: Size3 = PATCH,
    *,
    kind: TargetKind = "per_channel",
    strategy: str = "easy_to_hard",
    predictor: bool = True,
) -> tuple[HardPatchesMining, MaskedAutoencoder]:
    grid = TokenGrid.of_clip(size, patch)
    torch.manual_seed(0)
    student, teacher = (
        Geometry(grid, patch, TINY, "sequence").autoencoder(TINY, predictor=predictor).eval()
        for _ in range(2)
    )
    num_masked = count_masked(grid.num_tokens, 0.75, "hpm")
    objective = HardPatchesMining(
        {"": MaskRule(grid, "token", num_masked, STRATEGIES[strategy])},
        PixelTarget(patch, MEAN, STD, kind),
        predictor="relative" if predictor else "none",
        predictor_weight=1.0,
        ema=teacher if predictor else None,
        momentum=MomentumSchedule("paper", 0.999, 0.9999),
    )
    return objective, student


def make_study(size: Size3 = VIDEO, patch: Size3 = PATCH, num_masks: int = 3) -> Study:
    objective, student = make_objective(size, patch)
    return study_clips(objective, student, make_batch(size), num_masks=num_masks)[0]


def draw_mask(objective: HardPatchesMining, batch: ClipBatch) -> TokenMask:
    rule = objective.masks[batch.source]
    return rule.draw(None, uniform(batch.keys, rule.num_units, "test"), 0)


def pixels_of(flags: np.ndarray, study: Study) -> np.ndarray:
    """(N,) -> (T, H, W)"""
    grid = study.grid
    lattice = flags.reshape(grid.time, grid.height, grid.width)
    return np.kron(lattice, np.ones(study.patch_size, dtype=int)).astype(bool)


def images_of(sheet: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in sheet.axes]


def texts_of(sheet: Figure) -> list[str]:
    return list(dict.fromkeys(text.get_text() for text in sheet.findobj(Text)))


# What is measured


def test_visible_patches_of_the_reconstruction_are_those_of_the_input() -> None:
    study = make_study()
    hidden = pixels_of(study.masked, study)
    np.testing.assert_array_equal(study.reconstruction[~hidden], study.frames[~hidden])
    assert (study.reconstruction[hidden] != study.frames[hidden]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_right_reconstructs_the_input_without_error(kind: TargetKind) -> None:
    objective, _ = make_objective(kind=kind)
    batch = make_batch()

    def know_all(clips: Tensor, mask: TokenMask) -> Prediction:
        return Prediction(objective.target.of(batch.clips, mask), None)

    (study,) = study_clips(objective, know_all, batch, num_masks=4)
    np.testing.assert_array_equal(study.reconstruction, study.frames)
    assert np.nanmax(study.true_error) == 0
    assert study.ranking_accuracy is None  # all errors are equal


def test_hidden_pixels_give_nothing_away_without_ground_truth() -> None:
    objective, _ = make_objective()
    batch = make_batch()
    mask = draw_mask(objective, batch)
    hidden = pixels_of(mask.masked[0].numpy(), make_study())
    changed = batch.clips.clone()
    changed[0, :, torch.from_numpy(hidden)] = 7
    predicted = torch.randn(1, mask.masked_ids.shape[1], 3 * 2 * 8 * 8)
    for source, same in ("visible", True), ("input", False):
        first, second = (
            reconstruct(predicted, clips, mask, objective.target, source)
            for clips in (batch.clips, changed)
        )
        assert torch.equal(first, second) == same


def test_statistics_are_estimated_from_the_nearest() -> None:
    objective, _ = make_objective()
    batch = make_batch()
    mask = draw_mask(objective, batch)
    patches = objective.target.patches(torch.full_like(batch.clips, 99))
    visible = objective.target.statistics(mask.take_visible(patches))
    estimated = statistics_from_visible(visible, mask, objective.masks[""].grid)
    torch.testing.assert_close(
        estimated.mean, torch.full_like(estimated.mean, 99 / 255), rtol=1e-5, atol=0
    )
    ramp = visible._replace(mean=mask.visible_ids[..., None].float())
    near = statistics_from_visible(ramp, mask, objective.masks[""].grid).mean
    assert near.min() >= mask.visible_ids.min()
    assert near.max() <= mask.visible_ids.max()


def test_the_error_is_averaged_over_the_masks_that_hide_a_token() -> None:
    objective, student = make_objective()
    batch = make_batch()
    (study,) = study_clips(objective, student, batch, num_masks=3)
    errors = np.full((3, objective.masks[""].grid.num_tokens), np.nan)
    purposes = [f"picture {index}" for index in range(3)]
    for index, evaluation in enumerate(objective.evaluate(student, batch, purposes)):
        errors[index, evaluation.mask.masked_ids[0]] = evaluation.errors[0]
    known = ~np.isnan(errors).all(axis=0)
    np.testing.assert_array_equal(np.isnan(study.true_error), ~known)
    expected = np.nanmean(errors[:, known], axis=0)
    np.testing.assert_allclose(study.true_error[known], expected, rtol=1e-5)


def test_an_error_is_unknown_where_no_mask_hid_the_token() -> None:
    study = make_study(num_masks=1)
    assert np.isnan(study.true_error).sum() == study.grid.num_tokens - study.masked.sum()
    assert images_of(draw_sheet(study))


def test_the_mask_hides_the_hardest_and_says_which() -> None:
    study = make_study()
    assert study.difficulty is not None
    assert study.picked.sum() == study.masked.sum() // 2
    assert study.masked[study.picked].all()
    assert study.difficulty[study.picked].min() >= study.difficulty[~study.picked].max()


def test_the_easiest_are_picked_where_the_strategy_says_so() -> None:
    objective, student = make_objective(strategy="easiest")
    (study,) = study_clips(objective, student, make_batch(), num_masks=1)
    assert study.difficulty is not None
    assert study.pick == "easiest"
    assert (study.picked == study.masked).all()
    assert study.difficulty[study.picked].max() <= study.difficulty[~study.picked].min()


def test_a_plain_masked_autoencoder_has_no_prediction_and_a_random_mask() -> None:
    objective, student = make_objective(strategy="random", predictor=False)
    (study,) = study_clips(objective, student, make_batch(), num_masks=2)
    assert study.difficulty is None
    assert study.ranking_accuracy is None
    assert not study.picked.any()
    assert [panel.title for panel in make_panels(study)] == [
        "Input",
        "True error",
        "Mask",
        "Reconstruction",
    ]
    assert images_of(draw_sheet(study))


def test_clips_are_studied_alike_alone_and_in_a_batch() -> None:
    objective, student = make_objective()
    batch = make_batch(clips=2)
    both = study_clips(objective, student, batch, num_masks=2)
    second = dataclasses.replace(
        batch, clips=batch.clips[1:], keys=batch.keys[1:], files=batch.files[1:]
    )
    (alone,) = study_clips(objective, student, second, num_masks=2)
    assert alone.name == both[1].name == "clip 1"
    np.testing.assert_array_equal(alone.masked, both[1].masked)
    np.testing.assert_allclose(alone.true_error, both[1].true_error, rtol=1e-4)


@pytest.mark.parametrize(("kind", "source"), [("raw", "none"), ("joint", "visible")])
def test_a_study_says_where_patch_statistics_are_from(kind: TargetKind, source: str) -> None:
    objective, student = make_objective(kind=kind)
    (study,) = study_clips(
        objective, student, make_batch(), num_masks=1, ground_truth_statistics=False
    )
    assert study.statistics == source


def test_ranking_accuracy_counts_pairs_in_order() -> None:
    study = make_study()
    size = len(study.masked)
    error = np.arange(size, dtype=np.float32)
    error[0] = np.nan
    difficulty = np.arange(size, dtype=np.float32)
    right = dataclasses.replace(study, true_error=error, difficulty=difficulty)
    assert right.ranking_accuracy == 1
    assert dataclasses.replace(right, difficulty=-difficulty).ranking_accuracy == 0


def test_ranks_run_from_0_to_1_and_ties_share_one() -> None:
    scores = np.array([5, np.nan, 1, 9, 5], dtype=np.float32)
    np.testing.assert_allclose(to_ranks(scores), [0.5, np.nan, 0, 1, 0.5])
    np.testing.assert_allclose(to_ranks(scores[:1]), [0])


# Drawing


@pytest.mark.parametrize(
    ("size", "patch"),
    [
        ((1, 16, 16), (1, 8, 8)),  # an image
        ((4, 16, 40), (2, 8, 8)),
        ((20, 32, 16), (2, 8, 4)),  # more time steps than columns
    ],
)
def test_any_size_is_drawn(size: Size3, patch: Size3) -> None:
    study = make_study(size, patch)
    for panel in make_panels(study):
        assert panel.frames.shape == (*size, 3)
        assert panel.frames.dtype == np.uint8
    assert len(images_of(draw_sheet([study] * 3))) == 3


def test_a_sheet_shows_the_frames_themselves() -> None:
    study = make_study((4, 16, 24))
    (image,) = images_of(draw_sheet(study, [1, 2]))
    np.testing.assert_array_equal(image[:16, :24], study.frames[1])
    np.testing.assert_array_equal(image[:16, -24:], study.frames[2])
    np.testing.assert_array_equal(image[-16:, :24], study.reconstruction[1])


def test_the_mask_shows_visible_patches_and_tints_those_hidden_for_being_hard() -> None:
    study = make_study()
    mask = next(panel for panel in make_panels(study) if panel.title == "Mask").frames
    hidden, picked = pixels_of(study.masked, study), pixels_of(study.picked, study)
    np.testing.assert_array_equal(mask[~hidden], study.frames[~hidden])
    for flags, colour in (picked, pictures.PICKED), (hidden & ~picked, pictures.HIDDEN):
        of_frame = mask[flags] - pictures.TINT * np.array(colour)
        expected = (1 - pictures.TINT) * study.frames[flags]
        np.testing.assert_allclose(of_frame, expected, atol=0.51)


def test_an_error_that_is_not_known_is_not_drawn_as_one() -> None:
    study = make_study(num_masks=1)
    errors = next(panel for panel in make_panels(study) if panel.title == "True error").frames
    unknown = pixels_of(np.isnan(study.true_error), study)
    assert (errors[unknown] == pictures.UNKNOWN).all()
    assert not (errors[~unknown] == pictures.UNKNOWN).all(axis=-1).any()


def test_an_image_has_no_numbers_of_frames_and_is_called_one() -> None:
    texts = texts_of(draw_sheet(make_study((1, 16, 16), (1, 8, 8))))
    assert not [text for text in texts if text.startswith("frame ") or "clip" in text[6:]]
    assert "hardest patch of the image" in texts
    texts = texts_of(draw_sheet(make_study((4, 16, 16))))
    assert [text for text in texts if text.startswith("frame ")] == ["frame 1", "frame 3"]
    assert "hardest patch of the clip" in texts


def test_a_sheet_says_what_was_studied_and_which_frames(tmp_path: Path) -> None:
    moments = [f"{i} s" for i in range(4)]
    odd = dataclasses.replace(make_study((4, 16, 16)), name="a $x_{ \udcff\x1b[2J name")
    sheet = draw_sheet(odd, title="a run, a $video_{", moments=moments)
    texts = texts_of(sheet)
    assert sum(text.startswith("a run, a $video_{\n") for text in texts) == 1
    assert [text for text in texts if text in moments] == ["0 s", "2 s"]
    assert any(text.startswith(r"a $x_{ \udcff\x1b[2J name") for text in texts)
    save_sheet(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 2 * pictures.LARGEST_CELL * sheet.dpi


def test_where_features_are_predicted_nothing_is_reconstructed() -> None:
    objective, student = make_objective()
    features = Linear(3 * 2 * 8 * 8, 3 * 2 * 8 * 8).requires_grad_(requires_grad=False)

    def see(clips: Tensor) -> Tensor:
        return features(patchify(clips.float(), PATCH))

    objective.target = FeatureTarget(PATCH, MEAN, STD, see)
    studies = study_clips(objective, student, make_batch(clips=2), num_masks=3)
    for one in studies:
        titles = [panel.title for panel in make_panels(one)]
        assert titles == ["Input", "True error", "Predicted difficulty", "Mask"]
        assert np.nanmax(one.true_error) <= 4
    assert any("2 - 2 cos" in note for note in pictures._footnotes(studies))
    assert len(images_of(draw_sheet(studies))) == len(studies)


def test_clips_of_a_source_are_studied_by_its_own_rule() -> None:
    objective, student = make_objective()
    rule = objective.masks[""]
    fewer = dataclasses.replace(rule, num_masked=2, strategy=STRATEGIES["easiest"])
    objective.masks = {"": rule, "images": fewer}
    batch = dataclasses.replace(make_batch(), source="images")
    (study,) = study_clips(objective, student, batch, num_masks=2)
    assert study.masked.sum() == study.picked.sum() == 2
    assert study.pick == "easiest"


def test_a_clip_of_one_channel_is_drawn_in_grey() -> None:
    frames = study._to_frames(make_batch(channels=1).clips[0])
    assert frames.shape == (*VIDEO, 3)
    assert (frames[..., :1] == frames).all()


# Writing


def test_a_sheet_is_written_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new folder" / "sheet.png"
    sheet = draw_sheet(make_study())
    save_sheet(sheet, path)
    whole = path.read_bytes()

    def fail(self: Figure, file: Path, **options: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        save_sheet(sheet, path)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("size", [VIDEO, (3, 16, 40)])
def test_animations_hold_every_frame(tmp_path: Path, size: Size3) -> None:
    study = make_study(size, (1, 8, 8))
    sheets = draw_animation(study, title="a title")
    assert len(sheets) == len(study.frames)
    assert all(side % 2 == 0 for side in sheets[0].shape[:2])
    assert len({sheet.shape for sheet in sheets}) == 1
    assert any((sheet != sheets[0]).any() for sheet in sheets)


def test_training_writes_the_sheet_of_a_batch(tmp_path: Path) -> None:
    objective, student = make_objective()
    engine = TorchEngine(
        student,
        torch.optim.SGD(student.parameters()),
        device=torch.device("cpu"),
        precision="bf16",
    )
    path = write_pictures(tmp_path, "update-1", objective, engine, make_batch(clips=2))
    assert path == tmp_path / "update-1.png"
    with Image.open(path) as image:
        assert image.format == "PNG"


# The tool


@pytest.fixture
def show_masks() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "show_masks.py"
    spec = importlib.util.spec_from_file_location("show_masks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_tiny(folder: Path, **parts: Any) -> Path:
    """The checkpoint of a run before its first update."""
    config = PretrainConfig(
        model=ModelConfig(encoder=TINY, decoder=TINY, patch_size=PATCH),
        data=PretrainDataConfig(num_frames=4, frame_stride=2, frame_size=(16, 24)),
        masking=MaskingConfig(ratio=0.75),
        **parts,
    )
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    (folder / "state.json").write_text('{"update": 0}')
    for name in "model", "teacher":
        save_file(build_student(config).state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "checkpoint")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "a video.mp4"
    generator = np.random.default_rng(0)
    frames = generator.integers(256, size=(12, 32, 40, 3), dtype=np.uint8)
    write_video(path, frames)
    return path


def test_the_tool_writes_what_it_says(
    show_masks: ModuleType, checkpoint: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = video.parent / "pictures"
    options = ["--output", str(output), "--masks", "2", "--device", "cpu"]
    assert show_masks.main([str(checkpoint), str(video), *options]) == 0
    names = ["a video.png", "a video.mp4"]
    assert capsys.readouterr().out.splitlines() == [f"wrote {output / name}" for name in names]
    options += ["--animation", "none", "--without-ground-truth", "--start", "9", "--stride", "1"]
    assert show_masks.main([str(checkpoint), str(video), *options]) == 0
    names += ["a video-without-ground-truth.png"]
    assert sorted(path.name for path in output.iterdir()) == sorted(names)


def test_the_tool_draws_an_image_as_its_source_is_masked(
    show_masks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = SourceConfig(
        data=PretrainDataConfig(num_frames=2, frame_size=(16, 16)),
        masking=MaskingConfig(ratio=0.5),
    )
    folder = save_tiny(tmp_path / "mixed", mix={"images": images})
    pixels = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a picture.png")
    arguments = [str(folder), str(tmp_path / "a picture.png"), "--output", str(tmp_path)]
    options = ["--masks", "2", "--animation", "none", "--device", "cpu"]
    assert show_masks.main([*arguments, *options, "--source", "images"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"wrote {tmp_path / 'a picture-images.png'}"
    assert show_masks.main([*arguments, *options, "--source", "pictures"]) == 2
    assert (
        "--source pictures must be one of images; leave it out for the main"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "12"], "a video.mp4: its clip must begin in frames 0 to 11, not in 12"),
        (["--masks", "0"], "--masks: must be a whole number of at least 1"),
        (["--stride", "0"], "--stride: must be a whole number of at least 1"),
        (["--hard-fraction", "2"], "--hard-fraction must lie in [0, 1]"),
    ],
)
def test_the_tool_says_what_is_wrong_with_an_option(
    show_masks: ModuleType,
    checkpoint: Path,
    video: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    arguments = [str(checkpoint), str(video), "--output", str(video.parent), *options]
    try:
        code = show_masks.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_the_tool_says_what_is_wrong_with_a_file(
    show_masks: ModuleType, checkpoint: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*arguments: Path | str) -> str:
        assert show_masks.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("\nerror: ")
        return error

    assert "no.mp4 is not a file; name a video or an image" in error_of(
        checkpoint, video.with_name("no.mp4")
    )
    assert "is not a file; name a video" in error_of(checkpoint, video.parent)
    beside = (checkpoint, video, "--output", video.parent, "--masks", "1")
    assert f"a picture would overwrite {video} itself" in error_of(*beside)
    assert "--source a is for runs that mix sources" in error_of(checkpoint, video, "--source", "a")
    assert "cannot decode" in error_of(checkpoint, checkpoint / "config.yaml")
    content = bytearray(video.read_bytes())
    table = content.index(b"stsz") + 12  # the number of samples, after their common size
    content[table : table + 4] = b"\x7f\xff\xff\xff"
    lying = video.with_name("lying.mp4")
    lying.write_bytes(content)
    assert "cannot decode" in error_of(checkpoint, lying)
    assert "give a config, or a checkpoint folder of a run" in error_of(video.parent, video)
    weights = load_file(checkpoint / "model.safetensors")
    encoder = {
        name: value for name, value in weights.items() if name.startswith(("blocks.", "norm."))
    }
    decoder = {name: value for name, value in weights.items() if name not in encoder}
    for part, message in (encoder, "without its reconstructor"), (decoder, "missing blocks."):
        save_file(part, checkpoint / "model.safetensors")
        assert message in error_of(checkpoint, video)
