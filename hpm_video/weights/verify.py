"""Whether what was exported computes what our model does, loaded back by whom it is for."""

import contextlib
import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hpm_video.files.single_file import as_folder
from hpm_video.files.weights import CheckpointError
from hpm_video.models.vit import LAYER_NORM_EPS
from hpm_video.weights.forms import Expressed
from hpm_video.weights.importing import import_weights
from hpm_video.weights.own import OwnModel, load_own
from hpm_video.weights.parity import TOLERANCE, ParityReport, compare
from hpm_video.weights.peers import SAY, is_installed
from hpm_video.weights.sizes import Given
from hpm_video.weights.trial import Difference, Said, Trial, differences, make_trial, said_by
from hpm_video.weights.writing import WEIGHTS, kind_of, timm_arguments, timm_name


def trial_of(own: OwnModel, clips: int = 1) -> Trial:
    """Clips of noise, and a mask of the share that the model was trained with."""
    return make_trial(own.shape, own.clip_size, own.mask_ratio or 0.5, clips)


def not_checked(reason: str) -> ParityReport:
    """The report where nothing was compared."""
    return ParityReport("", not_checked=reason, tolerance=TOLERANCE)


# --- Our own importer ---------------------------------------------------------------------------


def check_file(own: OwnModel, file: Path) -> ParityReport:
    """Of a file in the layout of another project: with our importer, and what that reads further.

    That is with an independent implementation, which reads the file by names of its own.
    """
    imported = import_weights(file, given_for(own))
    if imported.fresh:
        raise CheckpointError(f"the exported file lacks {', '.join(imported.fresh)}")
    model = imported.build().eval()
    model.load_state_dict(imported.tensors)
    trial = trial_of(own)
    back = differences(said_by(own.build(), trial), said_by(model, trial))
    other = compare(imported)
    return replace(
        other,
        with_what=f"our importer and {other.with_what or 'nothing else'}",
        differences=(
            *(replace(each, of=f"{each.of} read back") for each in back),
            *other.differences,
        ),
    )


def given_for(own: OwnModel) -> Given:
    """What an importer has to be told of a file that says little of itself."""
    return Given(
        heads=own.shape.size.num_heads,
        decoder=own.decoder,
        decoder_heads=None if own.decoder is None else own.decoder.num_heads,
        num_frames=own.clip_size[0],
        frame_size=own.clip_size[1:],
        frame_stride=own.frame_stride,
        target=next((kind for kind in ("raw", "joint", "per_channel") if kind == own.target), None),
        label_names=own.label_names or None,
    )


def check_own(own: OwnModel, file: Path) -> ParityReport:
    """Of one file of our own: read alone, as ``tools/predict.py`` does."""
    trial = trial_of(own)
    with as_folder(file) as folder:
        model = load_own(folder, own.weights).build()
    return ParityReport(
        "this package, from the file alone",
        differences(said_by(own.build(), trial), said_by(model, trial)),
    )


# --- transformers -------------------------------------------------------------------------------

HARD_CODED = {
    "VideoMAEForPreTraining": "decoder.norm",
    "VideoMAEForVideoClassification": "fc_norm",
}
"""Norms of transformers whose eps, 1e-5, no config reaches."""


def check_transformers(own: OwnModel, expressed: Expressed, folder: Path) -> ParityReport:
    """Of a folder of transformers: with ``from_pretrained``.

    The norms whose eps no config reaches are set to ours, and the difference without that is told.

    Raises:
        CheckpointError: transformers finds tensors that are missing or left over.
    """
    if not is_installed("transformers"):
        return not_checked("transformers is not installed (pip install transformers)")
    import transformers

    kind = kind_of(expressed)
    with _quiet(transformers):
        model, found = getattr(transformers, kind).from_pretrained(
            folder, output_loading_info=True, local_files_only=True
        )
    wrong = [f"{key}: {sorted(found[key])}" for key in LOADING if found.get(key)]
    if wrong:
        raise CheckpointError(f"transformers does not take the whole folder: {'; '.join(wrong)}")
    trial, model = trial_of(own), model.eval()
    ours = said_by(own.build(), trial)

    def found_now() -> tuple[Difference, ...]:
        said = SAY[kind](model, trial)
        return differences(ours, {name: said[name] for name in said if name in ours})

    with torch.no_grad():
        as_it_is = found_now()
        name = f"transformers {transformers.__version__}: {kind}"
        if kind not in HARD_CODED:
            return ParityReport(name, as_it_is)
        norm = model.get_submodule(HARD_CODED[kind])
        usual, norm.eps = norm.eps, LAYER_NORM_EPS
        found_then = found_now()
    notes = tuple(
        f"what remains: {kind} has eps {usual:g} in {HARD_CODED[kind]}, which no config reaches; "
        f"as it is loaded, {each.of} differ by {each.largest:.1e} of values up to "
        f"{each.largest_value:.2g}. For equality set model.{HARD_CODED[kind]}.eps = "
        f"{LAYER_NORM_EPS:g}"
        for each in as_it_is
        if each.of in ("logits", "hidden patches") and usual != LAYER_NORM_EPS
    )
    return ParityReport(name, found_then, notes=notes)


LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
"""What transformers tells of weights that do not fit."""


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its progress bar and its advice."""
    logging = transformers.utils.logging
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


# --- timm ---------------------------------------------------------------------------------------


NO_LOCAL_SAFETENSORS = (
    "timm {} cannot read a folder of safetensors by local-dir, as later versions do: create the "
    "model and load the state dict"
)
"""Of old versions of timm."""


def check_timm(own: OwnModel, folder: Path) -> ParityReport:
    """Of a folder of timm: with ``create_model`` and the state dict, and by the folder's name."""
    import timm

    trial = trial_of(own)
    ours = said_by(own.build(), trial)
    channels = own.shape.channels
    notes: tuple[str, ...] = ()
    by_hand = timm.create_model(
        timm_name(own),
        num_classes=len(own.label_names),
        in_chans=channels,
        **timm_arguments(own),
    )
    by_hand.load_state_dict(load_file(folder / WEIGHTS))
    models: list[Any] = [by_hand]
    logging.getLogger("timm").setLevel(logging.WARNING)
    try:
        models.append(timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=channels))
    except pickle.UnpicklingError:
        notes = (NO_LOCAL_SAFETENSORS.format(timm.__version__),)
    images = trial.clips.squeeze(2)
    said: Said = {}
    with torch.no_grad():
        for model in models:
            model.eval()
            if own.is_classifier:
                both: Said = {"logits": model(images)}
            else:
                both = {"tokens": model.forward_features(images), "features": model(images)}
            said = both if not said else _farther(ours, said, both)
    name = f"timm {timm.__version__}: {timm_name(own)}"
    return ParityReport(name, differences(ours, said), notes=notes)


def _farther(ours: Said, first: Said, second: Said) -> Said:
    """Of two models, for each value what the one says that differs more from ours."""
    chosen = {}
    for name in first:
        far = [(ours[name] - each[name]).abs().max().item() for each in (first, second)]
        chosen[name] = (first, second)[far[1] > far[0]][name]
    return chosen


# --- ONNX ---------------------------------------------------------------------------------------


def check_onnx(own: OwnModel, file: Path) -> ParityReport:
    """Of a program of ONNX: with onnxruntime, on several clips at once and on one."""
    if not is_installed("onnxruntime"):
        return not_checked("onnxruntime is not installed (pip install onnxruntime)")
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    trial = trial_of(own, clips=2)
    ours = said_by(own.build(), trial)["logits"]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    whole = torch.cat([trial.clips, trial.clips[:1]])
    of_three = torch.from_numpy(session.run(["logits"], {"clips": whole.numpy()})[0])
    of_one = torch.from_numpy(session.run(["logits"], {"clips": whole[:1].numpy()})[0])
    found = differences(
        {"logits of 3 clips": torch.cat([ours, ours[:1]]), "logits of 1 clip": ours[:1]},
        {"logits of 3 clips": of_three, "logits of 1 clip": of_one},
    )
    return ParityReport(f"onnxruntime {onnxruntime.__version__}", found)
