"""Models as folders with a model card, and on the Hugging Face Hub."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hpm_video.files.atomic import temporary_folder
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.training.checkpoint import checksums_of, on_host, read_state
from hpm_video.training.summary import Rows, cost_of, lines_of, measures_of, tests_of
from hpm_video.weights.families import licence_of
from hpm_video.weights.importing import texts_of, write_json

CARD = """---
library_name: hpm-video
pipeline_tag: {task}
tags: [hpm-video, {tag}]
---

# {name}

This is a {kind}, trained with `hpm_video` (Hard Patches Mining for video and images).

```python
import hpm_video

model = hpm_video.load({source})
{use}
```

## Measures

{measures}

## Training

{training}

## Licence

{licence}

## Config

```yaml
{config}```
"""

WRITTEN = ["curves.png", "labels.txt", "origin.json"] + [
    f"{name}.safetensors" for name in ("model", "teacher", "average")
]
"""Files that one model has and another does not: an upload takes those of the one before it away.
"""


def save_pretrained(trained: TrainedModel, folder: Path, name: str = "") -> Path:
    """Write a model as a folder that ``hpm_video.load`` reads, with a model card. -> the folder

    Args:
        trained: a model; the teacher of a masked autoencoder goes along where there is one.
        folder: an empty one, or one that is not there.
        name: the model's name on the Hub; by default that of the folder.

    Raises:
        CheckpointError: the folder has files already, or the weights cannot be read.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} has files already, or is one; give another folder")
    weights = {trained.file: trained.tensors}
    if not trained.is_classifier and trained.teacher is not None:
        weights["teacher"] = trained.teacher
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in weights.items():
        save_file(on_host(tensors), folder / f"{file}.safetensors", metadata={"format": "pt"})
    for text, content in texts_of(trained).items():
        (folder / text).write_text(content, encoding="utf-8")
    write_json(folder / "state.json", {"update": trained.update, "sha256": checksums_of(folder)})
    curves = _run_of(trained) / "curves.png"
    if curves.is_file():
        shutil.copyfile(curves, folder / curves.name)
    card = model_card(trained, name or folder.resolve().name, curves=curves.is_file())
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def _run_of(trained: TrainedModel) -> Path:
    """The directory of the run that a checkpoint folder is of; otherwise the model's own."""
    folder = trained.path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else trained.path


def model_card(trained: TrainedModel, name: str, *, curves: bool) -> str:
    """Write the model card of a checkpoint of a run, or what of it other weights allow."""
    run, config, classes = _run_of(trained), trained.config, len(trained.label_names)
    state = read_state(trained.path) if (trained.path / "state.json").is_file() else {}
    lines = [line for line in lines_of(run) if line["update"] <= trained.update]
    measures: Rows = [("measure", "at the start", "now", "baseline"), *measures_of(lines, classes)]
    tests = "".join(f"\n\nTest {test}: {result}" for test, result in tests_of(run))
    data, origin = config.data, trained.origin
    if config.init_weights and not origin:
        imported = Path(config.init_weights).expanduser() / "origin.json"
        origin = imported.read_text(encoding="utf-8") if imported.is_file() else ""
    training = [
        ("data", f"{data.train} ({state.get('data', 'files not counted')})"),
        ("clips", f"{data.num_frames} frames of {data.frame_size[0]} x {data.frame_size[1]}"),
        ("starts from", config.init_weights or "random weights"),
        *cost_of(lines, config.recipe.batch_size * data.repeats),
        ("device", state.get("facts", {}).get("device", "not known")),
    ]
    shown = "\n\n![Curves of the run](curves.png)" if curves else ""
    chosen = ', "teacher"' if trained.weights == "teacher" else ""
    call = "probabilities_of" if classes else "features_of"
    return CARD.format(
        task="video-classification" if classes else "feature-extraction",
        tag="classifier" if classes else "masked-autoencoder",
        name=name,
        kind=trained.kind,
        source=json.dumps(name, ensure_ascii=False) + chosen,
        use=f'{call.removesuffix("_of")} = model.{call}(["my_video.mp4"])',
        measures=(_table(measures) if measures[1:] else "No validation was recorded.") + tests,
        training=_table([("", ""), *training]) + shown,
        licence=licence_of(origin),
        config=texts_of(trained)["config.yaml"],
    )


def _table(rows: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def push_to_hub(trained: TrainedModel, repo_id: str, *, private: bool = False) -> str:
    """Upload what :func:`save_pretrained` writes, in one commit. -> the address

    What it wrote there before is replaced; other files of the repository stay.

    Raises:
        CheckpointError: huggingface_hub is missing, or the Hub cannot be reached or refuses it.
    """
    api: Any = _library(f"to upload {repo_id}").HfApi()
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as place:
        folder = save_pretrained(trained, Path(place) / "model", repo_id)
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            message = f"Upload a {trained.kind}"
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=WRITTEN
            )
        except Exception as error:  # of its client for HTTP, which differs between versions
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{repo_id} cannot be uploaded to the Hub ({reason}); to log in: hf auth login"
            ) from error
    return str(address)


def download(name: str) -> Path:
    """Return the folder of a model on the Hub, downloaded unless it is there already.

    Raises:
        CheckpointError: there is none, or huggingface_hub is missing.
    """
    hub = _library(f"there is no {name} here, and looking for it on the Hub")
    try:
        return Path(hub.snapshot_download(name))
    except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:  # it is no name there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"there is no {name} here, nor on the Hub ({reason})") from error


def _library(purpose: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise CheckpointError(
            f"{purpose} needs huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub
