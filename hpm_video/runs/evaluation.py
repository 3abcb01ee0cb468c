"""The test of a finished run: its accuracy on all views of the validation videos."""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpm_video.config.schema import FinetuneConfig
from hpm_video.data.reading import Views
from hpm_video.recognition import testing
from hpm_video.recognition.inference import Inference, Reading
from hpm_video.recognition.trained_model import TrainedClassifier, open_trained
from hpm_video.runs.data import open_manifest
from hpm_video.runs.report import write_report
from hpm_video.training.checkpoint import read_state
from hpm_video.training.device import Precision, choose_device
from hpm_video.training.distributed import Processes
from hpm_video.training.fast import choose_compiling, make_fast

log = logging.getLogger(__name__)


def evaluate_run(
    config: FinetuneConfig,
    run_dir: Path,
    processes: Processes = Processes(),  # noqa: B008 - it is frozen
) -> dict[str, Any] | None:
    """Test a finished run as its config says. -> the result, none without a manifest to test on

    The result is written to a folder in ``test/`` that is named by what is tested and how. The same
    test of the same weights and videos is not repeated.

    Raises:
        BadFilesError: videos do not decode.
        ConfigError, ManifestError, CheckpointError: the test cannot be run.
    """
    how = config.test
    source = how.manifest or config.data.validation
    if source is None:
        log.info("no data.validation and no test.manifest: nothing is tested")
        return None
    # Of one process: a link that was just replaced may be seen late elsewhere.
    checkpoint = processes.of_first((run_dir / "checkpoints" / how.checkpoint).resolve)
    precision: Precision = read_state(checkpoint, of_run=True)["facts"]["precision"]
    key = "test.manifest" if how.manifest else "data.validation"
    manifest, views = open_manifest(config.data, source, key), Views(how.clips, how.crops)
    trained = open_trained(checkpoint, TrainedClassifier, how.weights)
    device = choose_device(config.engine.device, processes.count)
    classifier = Inference.load(trained, device, precision)
    engine = config.engine
    make_fast(choose_compiling(engine, device), classifier.model, residual=engine.residual)
    what = {
        "checkpoint": str(run_dir / "checkpoints" / checkpoint.name),
        "chosen_as": how.checkpoint,
        "manifest": source,
        "exclude_bad_files": how.exclude_bad_files,
        **testing.describe_test(trained, classifier, manifest, views),
    }
    name = f"{how.checkpoint}-{how.weights}-{how.clips}x{how.crops}-{Path(source).stem}"
    folder = run_dir / "test" / name
    before = processes.of_first(lambda: _result_before(folder / "result.json", what))
    if before is not None:
        return before
    log.info("testing %s", _describe_test(what))
    reading = Reading.of(config.data, exclude_bad_files=how.exclude_bad_files)
    names = trained.label_names
    scores = testing.score_videos(classifier, names, manifest, views, reading, processes)
    result = {"folder": str(folder), "test": what, **testing.summarise(scores, names)}
    if processes.is_first:
        testing.write_results(folder, scores, result, names)
        write_report(run_dir)
    return result


def _result_before(path: Path, what: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of the same test, if it was written."""
    with suppress(OSError, ValueError):
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if before.get("test") == what:
            return before
    return None


def _describe_test(how: dict[str, Any]) -> str:
    return (
        f"the {how['chosen_as']} checkpoint ({how['weights']} of update {how['update']}), "
        f"{how['clips']} x {how['crops']} views of each video"
    )


def describe_evaluation(result: dict[str, Any]) -> str:
    """Describe the result of :func:`evaluate_run` for the terminal."""
    return f"{_describe_test(result['test'])}:\n{testing.describe(result)}"
