"""The encoder that pre-training, fine-tuning and probes share: tokens of clips, seen or masked."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hpm_video.config.choices import Init
from hpm_video.config.model import EncoderConfig
from hpm_video.models.positions import FixedPositions
from hpm_video.models.vit import Transformer, init_linear
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import TokenMask
from hpm_video.tokens.patches import patchify


class ClipEncoder(nn.Module):
    """Tokens of clips through a transformer.

    A class token, where there is one, has no position (MAE gives it the code 0).
    """

    def __init__(
        self,
        settings: EncoderConfig,
        grid: TokenGrid,
        *,
        source_grid: TokenGrid | None = None,
        other_grids: Iterable[TokenGrid] = (),
        final_norm: bool = True,
        init: Init | None = "truncated_normal",
    ) -> None:
        """Build the layers, and draw initial weights.

        Args:
            settings: the model's section of a config.
            grid: tokens of a clip.
            source_grid: grid of pre-training, in which tokens have their positions; default: grid.
            other_grids: of further kinds of clips, whose tokens have their positions alike.
            final_norm: whether a norm follows the blocks.
            init: none where a class that builds on this one calls :meth:`init_encoder`.
        """
        super().__init__()
        self.settings, self.grid, self.source_grid = settings, grid, source_grid or grid
        self.num_prefix = int(settings.class_token)
        self.patch_values = settings.channels * math.prod(settings.patch_size)
        self.grids = tuple(dict.fromkeys((grid, *other_grids)))
        dim = settings.encoder.dim
        self.patch_embed = nn.Linear(self.patch_values, dim)
        self.class_token = nn.Parameter(torch.zeros(dim)) if settings.class_token else None
        self.encoder = Transformer(
            settings.encoder,
            drop_path=settings.drop_path,
            checkpoint_activations=settings.checkpoint_activations,
            final_norm=final_norm,
            conventions=settings.conventions,
        )
        self.encoder_positions = self.make_positions(dim)
        if init is not None:
            self.init_encoder(init)

    def make_positions(self, dim: int) -> FixedPositions:
        """Build the positions of all its clips at a width."""
        return FixedPositions(self.grids, dim, self.settings.positions, self.source_grid)

    def init_encoder(self, init: Init) -> None:
        """Draw initial weights. VideoMAE's patch embedding keeps PyTorch's own."""
        self.encoder.apply(INITS[init])
        if self.settings.conventions == "mae":
            nn.init.xavier_uniform_(self.patch_embed.weight)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.02)

    def encode(
        self, clips: Tensor, keys: Tensor | None = None, mask: TokenMask | None = None
    ) -> Tensor:
        """Tokens of normalised clips, of the visible ones where a mask is given.

        (B, C, T, H, W), (B,) keys -> (B, N or V, D), or one more where a class token goes first

        The keys decide which residual branches stochastic depth drops; without them, none.
        """
        positions = self.encoder_positions(self.grid_of(clips))
        patches = patchify(clips, self.settings.patch_size)
        if mask is not None:
            patches, positions = mask.take_visible(patches), positions[mask.visible_ids]
        tokens = self.patch_embed(patches) + positions
        if self.class_token is not None:
            first = self.class_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
            tokens = torch.cat([first, tokens], dim=1)
        out: Tensor = self.encoder(tokens, self.encoder.draws(keys))
        return out

    def grid_of(self, clips: Tensor) -> TokenGrid:
        """(B, C, T, H, W) -> the grid of their tokens"""
        size = (clips.shape[2], clips.shape[3], clips.shape[4])
        return TokenGrid.of_clip(size, self.settings.patch_size)

    def pool(self, tokens: Tensor) -> Tensor:
        """One vector for each clip: the class token, or else the mean: (B, ., D) -> (B, D)"""
        return tokens.mean(dim=1) if self.class_token is None else tokens[:, 0]

    def of_clip(self, tokens: Tensor) -> Tensor:
        """All but the class token: (B, ., D) -> (B, N or V, D)"""
        return tokens[:, self.num_prefix :]

    @property
    def num_layers(self) -> int:
        """Of :meth:`layer_of`, and one: the patch embedding, the blocks and what follows them."""
        return len(self.encoder.blocks) + 2

    def layer_of(self, name: str) -> int:
        """Depth of a parameter: 0 the embedding, k + 1 block k, and above all, the rest."""
        if name.startswith(("patch_embed.", "class_token")):
            return 0
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        return self.num_layers - 1


def _init_truncated_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


INITS: dict[Init, Callable[[nn.Module], None]] = {
    "truncated_normal": _init_truncated_normal,
    "xavier": init_linear,
}
