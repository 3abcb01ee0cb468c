"""The lattice of tokens that a clip is cut into.

Axes, everywhere in this package:
    B clips in a batch      C colour channels      T, H, W frames and pixels of a clip
    N tokens of a clip      V visible, M masked (N = V + M)
    U mask units of a clip  D embedding width      P pixel values in one patch
    K frames of a video     R clips taken from one decoded video
"""

from dataclasses import dataclass

Size3 = tuple[int, int, int]
"""A size or a step along (time, height, width)."""


@dataclass(frozen=True)
class TokenGrid:
    """Tokens along time, height and width. An image is a grid with ``time == 1``."""

    time: int
    height: int
    width: int

    @classmethod
    def of_clip(cls, clip_size: Size3, patch_size: Size3) -> "TokenGrid":
        """The grid of a clip of ``clip_size`` frames and pixels cut into whole patches.

        Raises ValueError if ``patch_size`` does not divide ``clip_size``.
        """
        axes = ("frames", "height", "width")
        for axis, size, patch in zip(axes, clip_size, patch_size, strict=True):
            if size < 1 or patch < 1 or size % patch:
                below = size // max(patch, 1) * patch
                above = below + patch
                raise ValueError(
                    f"{axis} of a clip must be a multiple of its patch size, got {size} with patch "
                    f"{patch}; the nearest that fit are {below or above} and {above}"
                )
        return cls(*(size // patch for size, patch in zip(clip_size, patch_size, strict=True)))

    def __str__(self) -> str:
        return f"{self.time}x{self.height}x{self.width}"

    @property
    def shape(self) -> Size3:
        """The sizes (T', H', W')."""
        return self.time, self.height, self.width

    @property
    def tokens_per_step(self) -> int:
        """Positions of one time step."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole clip (N)."""
        return self.time * self.tokens_per_step
