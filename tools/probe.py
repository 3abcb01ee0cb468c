"""How good are frozen features? python tools/probe.py CHECKPOINT --train LIST --validation LIST.

knn        votes of the nearest training videos by cosine similarity
logistic   logistic regression on cached features, solved to the optimum, in seconds
linear     the linear probe of the papers: SGD with augmentation, see configs/probe/linear.yaml;
           for images: linear_images
attentive  a learned query attends over the tokens, see configs/probe/attentive.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpm_video.config.checks import ConfigError
from hpm_video.config.choices import OF_PRETRAINING
from hpm_video.data.manifest import read_manifest
from hpm_video.files.atomic import write_json
from hpm_video.recognition.labels import class_names, numbered_as
from hpm_video.runs.console import add_options, make_parser, positive, run
from hpm_video.runs.options import add_model_options, clip_choice, open_inference, reading_of

CACHED = ("knn", "logistic")
TRAINED = ("linear", "linear_images", "attentive")
NEIGHBOURS = (10, 20, 100, 200)  # which are customary


def main(command_line: Sequence[str] | None = None) -> int:
    """Probe, and print the results."""
    parser = make_parser(__doc__)
    add_model_options(
        parser,
        "checkpoint folder of a pre-training run",
        (*OF_PRETRAINING, "untrained"),
        weights_help="default: student; untrained: the weights that pre-training began with",
        default_weights="student",
    )
    add = parser.add_argument
    add("--train", required=True, help="labelled manifest or folder of classes")
    add("--validation", required=True, help="the same for testing")
    kinds = CACHED + TRAINED
    add("--probes", nargs="+", choices=kinds, default=list(CACHED), help="default: knn, logistic")
    votes = "numbers of neighbours that vote (default 10 20 100 200)"
    add("--neighbours", type=positive, nargs="+", default=[*NEIGHBOURS], metavar="K", help=votes)
    of_trained = "overrides for the probes that are trained, such as recipe.batch_size=64"
    add("--set", nargs="+", default=[], metavar="section.key=value", help=of_trained)
    root = {"type": str, "help": "where relative paths in the manifests start"}
    output = {"help": "folder for probe.json, and for the runs of the probes that are trained"}
    add_options(parser, root=root, output=output)
    arguments = parser.parse_args(command_line)
    if not arguments.output and (trained := [k for k in arguments.probes if k in TRAINED]):
        parser.error(f"--probes {trained[0]} trains, and leaves a run: say where, by --output")
    return run(lambda: probe(arguments))


def probe(arguments: argparse.Namespace) -> None:
    """Run the probes, print a line for each, and write ``probe.json`` where there is an output."""
    path = arguments.output and arguments.output / "probe.json"
    if path and path.is_file():
        raise ConfigError(f"{path} holds a result already; take another --output, or delete it")
    results = probe_cached(arguments) if {*CACHED} & {*arguments.probes} else {}
    for kind in (kind for kind in arguments.probes if kind in TRAINED):
        results[kind] = probe_trained(arguments, kind)
    print(f"\n{'probe':28} top-1   top-5   (chance {results[next(iter(results))]['chance']:.3f})")
    for name, result in results.items():
        print(f"{name:28} {result['top1']:.3f}   {result['top5']:.3f}")
    if path:
        settings = vars(arguments) | {"checkpoint": str(arguments.checkpoint.resolve())}
        settings["output"] = str(arguments.output)
        write_json(path, {"settings": settings, "probes": results})
        print(f"\nwrote {path}")


def probe_cached(arguments: argparse.Namespace) -> dict[str, Any]:
    """Nearest neighbours and logistic regression on the clip in the middle of each video."""
    from hpm_video.recognition import probes
    from hpm_video.recognition.inference import over_videos
    from hpm_video.recognition.testing import summarise
    from hpm_video.recognition.trained_model import TrainedAutoencoder
    from hpm_video.training.distributed import Processes

    (_, encoder), reading = open_inference(arguments, TrainedAutoencoder), reading_of(arguments)
    paths = (arguments.train, arguments.validation)
    manifests = [read_manifest(path, arguments.root) for path in paths]
    manifests[1] = numbered_as(manifests[0].label_names, manifests[1])
    names, count, neighbours = class_names(*manifests), len(manifests[0]), arguments.neighbours
    if "knn" in arguments.probes and max(neighbours) > count:
        raise ConfigError(
            f"--neighbours must be at most the number of training videos, {count}, got "
            f"{max(neighbours)}; give smaller numbers: --neighbours {min(10, count)}"
        )
    if "logistic" in arguments.probes and count < probes.FOLDS:
        raise ConfigError(
            f"logistic regression is cross-validated in {probes.FOLDS} parts and needs as many "
            f"training videos, got {count}; leave it out: --probes knn"
        )
    clips = [reading.clips(manifest, encoder.data) for manifest in manifests]
    train, validation = (over_videos(encoder.pooled, each, reading, Processes()) for each in clips)
    results = {}
    if "knn" in arguments.probes:
        found = probes.nearest_neighbours(train, validation, len(names), neighbours)
        results = {f"{k} nearest neighbours": summarise(found[k], names) for k in found}
    if "logistic" in arguments.probes:
        penalty, scores = probes.logistic_regression(train, validation, len(names))
        results["logistic regression"] = {"penalty": penalty, **summarise(scores, names)}
    return results


def probe_trained(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Train a head on the frozen encoder, by the loop of fine-tuning."""
    from hpm_video.config.loading import load_config
    from hpm_video.config.schema import FinetuneConfig
    from hpm_video.runs.finetuning import (
        describe_evaluation,
        evaluate_run,
        finetune,
        for_checkpoint,
    )

    config = load_config(FinetuneConfig, Path(f"probe/{kind}"), arguments.set)
    config = for_checkpoint(config, arguments.checkpoint, arguments.weights)
    data = {n: getattr(arguments, n) for n in ("train", "validation", "root", "workers", "decoder")}
    config = replace(
        config,
        output_dir=str(arguments.output / kind),
        data=replace(clip_choice(arguments).of(config.data), **data),
        engine=replace(config.engine, device=arguments.device, precision=arguments.precision),
    )
    result = evaluate_run(config, finetune(config))
    assert result is not None
    print(f"\n{kind} probe: {describe_evaluation(result)}")
    return result


if __name__ == "__main__":
    sys.exit(main())
