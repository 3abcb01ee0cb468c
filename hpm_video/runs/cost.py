"""The multiply-adds of a clip in an update, counted on shapes alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpm_video.config.schema import FinetuneConfig, PretrainConfig, RunConfig
from hpm_video.mining.objective import thin
from hpm_video.models.from_config import build_classifier, build_student
from hpm_video.tokens.masking import TokenMask
from hpm_video.tokens.views import mask_of_view
from hpm_video.training.progress import Progress


def count_flop(config: RunConfig, source: str = "", *, picks: bool = True) -> tuple[float, float]:
    """Count the FLOP of a clip of a source, 2 per multiply-add: of the student, and of the teacher.

    The student goes forward and backward; activations that are computed again do not count, nor
    does a model whose features are the target. ``picks``: whether patches are picked as hard.
    """
    model = replace(config.model, checkpoint_activations=False)
    config, data = replace(config, model=model), config.sources[source]
    with torch.device("meta"), FlopCounterMode(display=False) as student:
        if isinstance(config, FinetuneConfig):
            classifier = build_classifier(config, config.model.num_classes or 2)
            clips = torch.empty(2, data.channels, *data.clip_size)  # a batch norm needs two
            classifier(clips).sum().backward()
            return student.get_total_flops() / 2, 0
        assert isinstance(config, PretrainConfig)
        rule, clip = config.mask_rule(source), torch.empty(1, data.channels, *data.clip_size)
        autoencoder, tokens = build_student(config), rule.grid.num_tokens
        num_masked = rule.num_masked * tokens // rule.num_units
        mask = TokenMask.from_masked(torch.ones(1, tokens).bool(), num_masked)
        mask = thin(mask, torch.zeros(1).long(), config.mining.decoded_share, "")
        outputs = [output for output in autoencoder(clip, mask) if output is not None]
        torch.stack([output.sum() for output in outputs]).sum().backward()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as teacher:
        if picks and rule.strategy.picks:
            seen = mask_of_view(config.mining.teacher_sees, rule.grid, "meta")
            autoencoder.score(autoencoder.encode(clip, mask=seen), rule.grid, seen)
        elif config.mining.target == "ema":
            autoencoder.encode(clip)
    return student.get_total_flops(), teacher.get_total_flops()


def count_gmac(config: RunConfig) -> tuple[float, float]:
    """Count GMAC of a clip for student and teacher, averaged over the sources by their weights."""
    costs = [count_flop(config, source) for source in config.sources]
    of_student, of_teacher = np.average(costs, axis=0, weights=config.weights) / 2e9
    return of_student, of_teacher


def cost_of_clips(config: RunConfig) -> Callable[[str, Progress], float]:
    """Return a function that gives the FLOP of a clip of a source at a moment of the run."""
    count = cache(partial(count_flop, config))

    def cost(source: str, progress: Progress) -> float:
        picks = isinstance(config, PretrainConfig) and (
            config.mask_rule(source).num_picked(progress.epoch, progress.epochs) > 0
        )
        return sum(count(source, picks=picks))

    return cost
