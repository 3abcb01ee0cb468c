"""Progress of a run, counted in videos."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The moment before an update."""

    update: int
    """Index of the update, from 0."""
    exact_epoch: float
    """Epochs that were seen before it."""
    epochs: int
    """Epochs of the run."""

    @property
    def epoch(self) -> int:
        """The epoch that the update begins in, from 0."""
        return min(int(self.exact_epoch), self.epochs - 1)


@dataclass(frozen=True)
class Timeline:
    """A run as a stream of videos, one shuffled pass over the data after another, cut into batches.

    A batch may reach from one pass into the next: each video is seen exactly once per epoch and
    none is dropped or padded.
    """

    num_videos: int
    batch_size: int
    epochs: int

    def __post_init__(self) -> None:
        if self.num_updates == 0:
            raise ValueError(
                f"{self.epochs} epochs of {self.num_videos} videos are less than one batch of "
                f"{self.batch_size}; take a smaller recipe.batch_size or more epochs"
            )

    @property
    def num_updates(self) -> int:
        """Updates of the run."""
        return self.num_videos * self.epochs // self.batch_size

    def at(self, update: int) -> Progress:
        """The moment before ``update``."""
        return Progress(update, update * self.batch_size / self.num_videos, self.epochs)

    def passes(self, update: int, every_epochs: float) -> bool:
        """Whether ``update`` completes a multiple of ``every_epochs`` epochs."""
        before, after = (self.at(number).exact_epoch for number in (update, update + 1))
        return int(after / every_epochs) > int(before / every_epochs)
