"""Mixup and CutMix of clips, by timm: a clip and its label become part of another clip.

timm draws from numpy's global generator, so it runs with one of its own here. It is imported when
mixing is set up: it takes seconds, and pre-training never mixes.
"""

from torch import Tensor

from hpm_video.randomness import global_generators


class Mixing:
    """Mixes each clip of a batch with its mirror image in the order of the batch.

    All clips of a batch are mixed alike, and all frames of a clip: one share, or one box.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float,
        cutmix: float,
        probability: float,
        switch_probability: float,
        label_smoothing: float,
    ) -> None:
        """Shares are drawn from Beta(a, a), where a is ``mixup`` or ``cutmix``; 0 is without it.

        A batch is mixed with ``probability``. With both kinds, ``switch_probability`` is that of
        CutMix. Labels are smoothed whether or not the batch is mixed.
        """
        from timm.data.mixup import Mixup

        self._mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=probability,
            switch_prob=switch_probability,
            mode="batch",
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, clips: Tensor, labels: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """Mix a batch: (B, C, T, H, W) float, (B,) int64 -> (B, C, T, H, W), (B, K) float32

        The targets of a clip sum to 1; K is the number of classes, and B even. What is drawn
        depends on ``key`` alone. The arguments keep their values, and the host waits for no device.
        """
        planes = clips.flatten(1, 2).clone()  # timm writes into what it is given
        with global_generators(key):
            mixed, targets = self._mixup(planes, labels)
        return mixed.view(clips.shape), targets
