"""The masked autoencoder with a second decoder that scores how hard each token is."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpm_video.masking import TokenMask
from hpm_video.models.pos_embed import Positions, position_table
from hpm_video.models.vit import Transformer, TransformerSize, init_linear
from hpm_video.targets import patchify
from hpm_video.token_grid import Size3, TokenGrid


class Prediction(NamedTuple):
    """What the model says about the hidden tokens."""

    pixels: Tensor
    """(B, M, P) reconstructed patches."""
    difficulty: Tensor | None
    """(B, M) predicted reconstruction error, on a scale of its own; none without a predictor."""


class Decoder(nn.Module):
    """A transformer over the embedded tokens of a clip, and a linear head."""

    def __init__(
        self,
        size: TransformerSize,
        out: int,
        *,
        checkpoint_activations: bool,
        exact_head: bool = False,
    ) -> None:
        """``exact_head`` keeps the head out of mixed precision."""
        super().__init__()
        self.exact_head = exact_head
        self.transformer = Transformer(size, checkpoint_activations=checkpoint_activations)
        self.head = nn.Linear(size.dim, out)

    def forward(self, tokens: Tensor, mask: TokenMask | None) -> Tensor:
        """(B, N, D) -> (B, M, out) for the hidden tokens, or (B, N, out) where there is no mask"""
        tokens = self.transformer.run_blocks(tokens)
        if mask is not None:
            tokens = mask.take_masked(tokens)
        tokens = self.transformer.norm(tokens)
        out: Tensor
        if self.exact_head:
            # A product and a sum, which mixed precision leaves alone, instead of a matrix product.
            out = (tokens.float().unsqueeze(-2) * self.head.weight).sum(-1) + self.head.bias
        else:
            out = self.head(tokens)
        return out


class MaskedAutoencoder(nn.Module):
    """Encodes the visible tokens and predicts the hidden ones.

    VideoMAE's asymmetric encoder and decoder; hard patches mining adds a loss predictor, a decoder
    of the same size, which reads the same embedded sequence and shares no weight after it.
    """

    def __init__(  # noqa: PLR0913 - each is a size or a switch of the architecture
        self,
        grid: TokenGrid,
        patch_size: Size3,
        encoder: TransformerSize,
        decoder: TransformerSize,
        *,
        channels: int = 3,
        predictor: bool = True,
        positions: Positions = "sequence",
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self.channels = channels
        values = channels * math.prod(patch_size)
        keep = {"checkpoint_activations": checkpoint_activations}
        self.patch_embed = nn.Linear(values, encoder.dim)
        self.encoder = Transformer(encoder, drop_path=drop_path, **keep)
        self.to_decoder = nn.Linear(encoder.dim, decoder.dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(decoder.dim))
        self.pixel_decoder = Decoder(decoder, values, **keep)
        # Only the order of scores counts, and bf16 would make many of them equal.
        self.difficulty_decoder = (
            Decoder(decoder, 1, exact_head=True, **keep) if predictor else None
        )

        self.encoder_pos: Tensor
        self.decoder_pos: Tensor
        for name, dim in ("encoder_pos", encoder.dim), ("decoder_pos", decoder.dim):
            self.register_buffer(name, position_table(grid, dim, positions), persistent=False)
        self._init_weights(values)

    def forward(self, clips: Tensor, mask: TokenMask, keys: Tensor | None = None) -> Prediction:
        """Predictions for the hidden tokens of normalised clips.

        (B, C, T, H, W), a mask, (B,) keys of the clips -> (B, M, P) pixels, (B, M) difficulty

        The keys decide which residual branches stochastic depth drops; without them, none.
        """
        patches = patchify(clips, self.patch_size)
        positions = self.encoder_pos[mask.visible_ids]
        tokens = self.patch_embed(mask.take_visible(patches)) + positions
        visible = self.to_decoder(self.encoder(tokens, self.encoder.draws(keys)))
        hidden = self.mask_token.to(visible.dtype).expand(*mask.masked_ids.shape, -1)
        sequence = mask.merge(visible, hidden) + self.decoder_pos
        pixels = self.pixel_decoder(sequence, mask)
        if self.difficulty_decoder is None:
            return Prediction(pixels, None)
        return Prediction(pixels, self.difficulty_decoder(sequence, mask).squeeze(-1))

    def score_all(self, clips: Tensor) -> Tensor:
        """Difficulty of every token, seeing all of them: (B, C, T, H, W) -> (B, N)

        The teacher's call: it never runs the reconstructor.

        Raises:
            ValueError: the model has no loss predictor.
        """
        if self.difficulty_decoder is None:
            raise ValueError("this model has no loss predictor, so it cannot score tokens")
        tokens = self.patch_embed(patchify(clips, self.patch_size)) + self.encoder_pos
        sequence = self.to_decoder(self.encoder(tokens)) + self.decoder_pos
        scores: Tensor = self.difficulty_decoder(sequence, None).squeeze(-1)
        return scores

    def _init_weights(self, values: int) -> None:
        """Initial weights of VideoMAE; patch_embed and to_decoder keep PyTorch's own."""
        self.encoder.apply(init_linear)
        self.pixel_decoder.apply(init_linear)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if self.difficulty_decoder is not None:
            self.difficulty_decoder.apply(init_linear)
            head = self.difficulty_decoder.head
            # The official head has P outputs, xavier-uniform, and averages them: this is what it
            # folds to. Scores start nearly equal.
            deviation = math.sqrt(2 / (head.in_features + values)) / math.sqrt(values)
            nn.init.normal_(head.weight, std=deviation)
