"""Models as folders with a model card, and on the Hugging Face Hub."""

import json
import shutil
import tempfile
from pathlib import Path

from hpm_video.files.atomic import temporary_folder
from hpm_video.files.single_file import NAMES
from hpm_video.files.weights import CheckpointError
from hpm_video.recognition.trained_model import TrainedModel
from hpm_video.training.summary import Rows, cost_of, lines_of, measures_of, tests_of
from hpm_video.weights.families import licence_of
from hpm_video.weights.importing import texts_of, write_model

CARD = """---
library_name: hpm-video
pipeline_tag: {task}
tags: [hpm-video]
---

# {name}

This is a {kind}, trained with `hpm_video` (Hard Patches Mining for video and images).

```python
import hpm_video

model = hpm_video.load({source})
print(model.{call}(["my_video.mp4"]))
```

## Measures

{measures}

## Data and cost

{cost}

## Licence

{licence}

## Config

```yaml
{config}```
"""

WRITTEN = ["curves.png", "labels.txt", "origin.json", *(f"{name}.safetensors" for name in NAMES)]
"""Files that only some models have: an upload deletes those of the model before it."""


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
        raise CheckpointError(f"{folder} is a file or has files already; give another folder")
    weights = {trained.file: trained.tensors}
    if not trained.is_classifier and trained.teacher is not None:
        weights["teacher"] = trained.teacher
    write_model(folder, trained, weights)
    card = model_card(trained, name or folder.resolve().name)
    if (curves := _run_of(trained) / "curves.png").is_file():
        shutil.copyfile(curves, folder / curves.name)
        card += "\n![Curves of the run](curves.png)\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def _run_of(trained: TrainedModel) -> Path:
    """The directory of the run that a checkpoint folder is of; otherwise the model's own."""
    folder = trained.path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else trained.path


def model_card(trained: TrainedModel, name: str) -> str:
    """Write the model card of a checkpoint of a run, or what of it other weights allow."""
    run, config, origin = _run_of(trained), trained.config, trained.origin
    lines = [line for line in lines_of(run) if line["update"] <= trained.update]
    measures = measures_of(lines, len(trained.label_names))
    if config.init_weights and not origin:
        imported = Path(config.init_weights).expanduser() / "origin.json"
        origin = imported.read_text(encoding="utf-8") if imported.is_file() else ""
    teacher = ', "teacher"' if trained.weights == "teacher" else ""
    return CARD.format(
        task="video-classification" if trained.is_classifier else "feature-extraction",
        name=name,
        kind=trained.kind,
        source=json.dumps(name, ensure_ascii=False) + teacher,
        call="probabilities_of" if trained.is_classifier else "features_of",
        measures=_table([("measure", "at the start", "now", "baseline"), *measures])
        + _table([("test", "result"), *tests_of(run)])
        or "No validation was recorded.\n",
        cost=_table(
            [
                ("", ""),
                ("data", config.data.train),
                ("starts from", config.init_weights or "random weights"),
                *cost_of(lines, config.recipe.batch_size * config.data.repeats),
            ]
        ),
        licence=licence_of(origin),
        config=texts_of(trained)["config.yaml"],
    )


def _table(rows: Rows) -> str:
    """Write rows below a head, if there are any."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if len(rows) == 1:
        return ""
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], "", ""])


def push_to_hub(trained: TrainedModel, repo_id: str, *, private: bool = False) -> str:
    """Upload what :func:`save_pretrained` writes, in one commit. -> the address

    What it wrote there before is replaced; other files of the repository stay.

    Raises:
        CheckpointError: the Hub cannot be reached or refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as place:
        folder = save_pretrained(trained, Path(place) / "model", repo_id)
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            message = f"Upload a {trained.kind}"
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=WRITTEN
            )
        except Exception as error:  # of its client for HTTP, which differs between versions
            raise CheckpointError(
                f"{repo_id} cannot be uploaded to the Hub ({_first_line(error)}); to log in: hf "
                "auth login"
            ) from error
    return str(address)


def download(name: str) -> Path:
    """Return the folder of a model on the Hub, downloaded unless it is there already.

    Raises:
        CheckpointError: there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, OSError, ValueError) as error:  # it is no name there
        reason = _first_line(error)
        raise CheckpointError(f"there is no {name} here, nor on the Hub ({reason})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
