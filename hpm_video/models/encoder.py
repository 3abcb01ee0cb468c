"""The encoder that pre-training, fine-tuning and probes share: tokens of clips, seen or masked."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hpm_video.config.choices import Init
from hpm_video.config.model import EncoderConfig
from hpm_video.models.positions import position_table, resize_positions
from hpm_video.models.vit import Transformer, init_linear
from hpm_video.tokens.grid import Size3, TokenGrid
from hpm_video.tokens.masking import TokenMask
from hpm_video.tokens.patches import patchify


class PatchEmbed(nn.Module):
    """A convolution by patches, computed on patches that are cut already."""

    def __init__(self, channels: int, patch_size: Size3, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, P) -> (B, N, D)"""
        weight = rearrange(self.proj.weight, "d c t h w -> d (t h w c)")
        return F.linear(patches, weight, self.proj.bias)


class ClipEncoder(Transformer):
    """A transformer over the tokens of clips, at fixed positions.

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
        """Build the layers for clips of ``grid`` or ``other_grids``, and draw initial weights.

        ``source_grid``: of pre-training, in which tokens have their positions; default: ``grid``.
        ``init``: none where a class that builds on this one calls :meth:`init_encoder`.
        """
        dim = settings.encoder.dim
        patch_embed = PatchEmbed(settings.channels, settings.patch_size, dim)  # drawn first
        super().__init__(
            settings.encoder,
            drop_path=settings.drop_path,
            checkpoint_activations=settings.checkpoint_activations,
            final_norm=final_norm,
        )
        self.settings, self.grid, self.source_grid = settings, grid, source_grid or grid
        self.num_prefix = int(settings.class_token)
        self.grids = tuple(dict.fromkeys((grid, *other_grids)))
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if settings.class_token else None
        self.add_positions("pos_embed", dim)
        if init is not None:
            self.init_encoder(init)

    def add_positions(self, name: str, dim: int) -> None:
        """Register the positions of all its clips at a width. Only given ones are saved."""
        kind, source = self.settings.positions, self.source_grid
        if kind == "given":
            self.register_buffer(name, position_table(source, dim, kind).unsqueeze(0))
            return
        for grid in self.grids:
            table = position_table(grid, dim, kind, source)
            self.register_buffer(f"{name}_{grid}", table, persistent=False)

    def positions(self, name: str, grid: TokenGrid) -> Tensor:
        """The positions of the tokens of a grid, in encoder or decoders: -> (N, D)"""
        if self.settings.positions == "given":
            return resize_positions(self.get_buffer(name)[0], self.source_grid, grid)
        if grid not in self.grids:
            raise ValueError(
                f"this model was made for clips of {' or '.join(map(str, self.grids))} tokens "
                f"(time x height x width), got {grid}"
            )
        return self.get_buffer(f"{name}_{grid}")

    def init_encoder(self, init: Init) -> None:
        """Draw initial weights. VideoMAE's patch embedding keeps PyTorch's own."""
        init_linear(self.blocks, init)
        if self.settings.conventions == "mae":
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def encode(
        self, clips: Tensor, keys: Tensor | None = None, mask: TokenMask | None = None
    ) -> Tensor:
        """Tokens of normalised clips, of the visible ones where a mask is given.

        (B, C, T, H, W), (B,) keys -> (B, N or V, D), or one more where a class token goes first

        The keys decide which residual branches stochastic depth drops; without them, none.
        """
        positions = self.positions("pos_embed", self.grid_of(clips))
        patches = patchify(clips, self.settings.patch_size)
        if mask is not None:
            patches, positions = mask.take_visible(patches), positions[mask.visible_ids]
        tokens = self.patch_embed(patches) + positions
        if self.cls_token is not None:
            first = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([first, tokens], dim=1)
        return self.norm(self.run_blocks(tokens, self.draws(keys)))

    def grid_of(self, clips: Tensor) -> TokenGrid:
        """(B, C, T, H, W) -> the grid of their tokens"""
        time, height, width = clips.shape[2:]
        return TokenGrid.of_clip((time, height, width), self.settings.patch_size)

    def pool(self, tokens: Tensor) -> Tensor:
        """One vector for each clip: the class token, or else the mean: (B, ., D) -> (B, D)"""
        return tokens.mean(dim=1) if self.cls_token is None else tokens[:, 0]

    def of_clip(self, tokens: Tensor) -> Tensor:
        """The tokens without the class token: (B, ., D) -> (B, N or V, D)"""
        return tokens[:, self.num_prefix :]

    @property
    def num_layers(self) -> int:
        """Number of layers of :meth:`layer_of`: patch embedding, blocks, and the rest above."""
        return len(self.blocks) + 2

    def layer_of(self, name: str) -> int:
        """Layer of a parameter: 0 for the embedding, k + 1 for block k, the last for the rest."""
        if name.startswith(("patch_embed.", "cls_token")):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.num_layers - 1
