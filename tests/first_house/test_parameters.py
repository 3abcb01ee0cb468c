"""Shape, weight decay, learning rate and initial values of all parameters of all shipped configs.

Models are built without memory. Initial standard deviations are measured on models of the true
widths with one block in the encoder and in each decoder and weights drawn from the config's seed:
all blocks of a transformer start alike.
"""

import json
import math
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpm_video.config.loading import load_config
from hpm_video.config.schema import FinetuneConfig, PretrainConfig
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.runs.finetuning import Finetuning
from hpm_video.runs.pretraining import Pretraining

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
ALL = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if not path.stem.endswith("_fast")  # their models are those of the exact configs
)
CLASSES = 10
"""The number of classes where a config leaves it to the data."""


def load(path):
    if path.startswith("pretrain/"):
        return load_config(PretrainConfig, CONFIGS / path, [])
    return load_config(FinetuneConfig, CONFIGS / path, ["init_weights=null"])


def build(config):
    """-> the model and its optimizer"""
    if isinstance(config, PretrainConfig):
        model = build_student(config)
        return model, Pretraining(config).optimizer(model)
    model = build_classifier(config, config.model.num_classes or CLASSES)
    return model, Finetuning(config).optimizer(model)


def what_is_built(config):
    """Everything in a config that its model depends on, except the rates of dropping branches."""
    model = replace(config.model, drop_path=0.0)
    return model, config.data.clip_size, getattr(config, "mining", None)


def table(path, first_names, known):
    """Rows by the first house's names, with one row, named with ``{i}``, for all blocks.

    A row: shape, whether it decays, its share of the learning rate (or one per block), both None if
    it does not learn, and the number of blocks. ``known``: tables of earlier models
    """
    config = load(path)
    how = (config.recipe.weight_decay > 0, getattr(config.recipe, "layer_decay", None))
    key = str((*what_is_built(config), *how))
    key_biases = config.model.conventions == "mae"
    if key in known:
        return known[key]
    with torch.device("meta"):
        model, optimizer = build(config)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}

    def spread(key):
        """A setting of each parameter in the parameter's shape, so that renaming may split it."""
        values = {
            name: float(group_of[p][key]) if p in group_of else math.nan
            for name, p in model.named_parameters()
        }
        shapes = {name: p.shape for name, p in model.named_parameters()}
        return first_names(
            {
                name: torch.tensor(value, dtype=torch.float64).expand(shapes[name])
                for name, value in values.items()
            },
            key_biases=key_biases,
        )

    decays, shares, rows = spread("weight_decay"), spread("lr_scale"), defaultdict(list)
    for name, of_values in decays.items():
        decay, share = (each.flatten()[0].item() for each in (of_values, shares[name]))
        learns = not math.isnan(decay)
        row = [[*of_values.shape], decay > 0 if learns else None]
        row.append(float(f"{share:.6g}") if learns else None)
        rows[re.sub(r"blocks\.\d+\.", "blocks.{i}.", name)].append(row)
    known[key] = {name: merged(of_blocks) for name, of_blocks in rows.items()}
    return known[key]


def merged(of_blocks):
    """Merge the rows of all blocks: only their learning rates may differ."""
    shapes, decays, shares = zip(*of_blocks, strict=True)
    assert all(each == (shapes[0], decays[0]) for each in zip(shapes, decays, strict=True))
    return [shapes[0], decays[0], [*shares] if len(set(shares)) > 1 else shares[0], len(shapes)]


def starts(path, first_names, known):
    """Standard deviation and mean of each parameter of a new model with one block in each
    transformer, by name with ``{i}`` for the block. ``known``: values of earlier models"""
    config = load(path)
    sizes = {"encoder": replace(config.model.encoder, depth=1)}
    if isinstance(config, PretrainConfig):
        sizes["decoder"] = replace(config.model.decoder, depth=1)
    config = replace(config, model=replace(config.model, drop_path=0.0, **sizes))
    key = str(what_is_built(config))
    if key not in known:
        weights = first_names(
            {name: p.detach() for name, p in build(config)[0].named_parameters()},
            key_biases=config.model.conventions == "mae",
        )
        known[key] = {
            name.replace("blocks.0.", "blocks.{i}."): [
                float(f"{value.std(correction=0).item():.4g}"),
                float(f"{value.mean().item():.4g}"),
            ]
            for name, value in weights.items()
        }
    return known[key]


@pytest.fixture(scope="module")
def stored(fixtures):
    tables = json.loads((fixtures / "parameters.json").read_text())
    return {path: tables["tables"][number] for path, number in tables["configs"].items()}


def test_every_shipped_config_is_in_the_table(stored):
    assert [*stored] == ALL


def test_shapes_decay_and_learning_rates_are_those_of_the_first_house(stored, first_names):
    known = {}
    for path in ALL:
        expected = {name: row[:4] for name, row in stored[path].items()}
        assert table(path, first_names, known) == expected, path


def test_parameters_start_as_in_the_first_house(stored, first_names):
    """Only up to ViT-B: L and H are in the table as well, but start by the same rules."""
    known = {}
    for path in ALL:
        if load(path).model.encoder.dim > 768:
            continue
        for name, (deviation, mean) in starts(path, first_names, known).items():
            shape, *_, deviation_before, mean_before = stored[path][name]
            error = deviation_before / math.sqrt(math.prod(shape))  # the standard error of a mean
            # Four standard errors of a standard deviation; both values were rounded to 4 digits.
            near = pytest.approx(deviation_before, abs=4 * error / math.sqrt(2), rel=1e-3)
            assert deviation == near, (path, name)
            assert mean == pytest.approx(mean_before, abs=6 * error + 1e-9), (path, name)
