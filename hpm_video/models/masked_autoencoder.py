"""The masked autoencoder with a second decoder that scores how hard each token is."""

import math
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpm_video.config.choices import TransformerSize
from hpm_video.config.model import ModelConfig
from hpm_video.models.encoder import ClipEncoder
from hpm_video.models.vit import Transformer, init_linear
from hpm_video.tokens.grid import TokenGrid
from hpm_video.tokens.masking import TokenMask


class Prediction(NamedTuple):
    """The predictions for the hidden tokens."""

    content: Tensor  # (B, M, P): values of patches, or whatever the target is made of
    difficulty: Tensor | None  # (B, M), on its own scale; none without a predictor


class Decoder(Transformer):
    """A transformer over the embedded tokens of a clip, and a linear head."""

    def __init__(self, size: TransformerSize, out: int, *, checkpoint_activations: bool) -> None:
        super().__init__(size, checkpoint_activations=checkpoint_activations)
        self.head = nn.Linear(size.dim, out)

    def forward(self, tokens: Tensor, num_prefix: int, mask: TokenMask | None) -> Tensor:
        """Compute outputs for the hidden tokens, or without a mask for all.

        (B, num_prefix + V + M, D) -> (B, M or V + M, out)
        """
        tokens = self.run_blocks(tokens)[:, num_prefix:]
        if mask is not None:
            tokens = mask.take_merged(tokens)
        tokens = self.norm(tokens)
        if self.head.out_features == 1:
            # Only the order of scores counts, and bf16 would make many of them equal. Mixed
            # precision leaves a product and a sum alone.
            return (tokens.float().unsqueeze(-2) * self.head.weight).sum(-1) + self.head.bias
        return self.head(tokens)


class MaskedAutoencoder(ClipEncoder):
    """Encodes the visible tokens and predicts the hidden ones.

    The asymmetric encoder and decoder of MAE and VideoMAE; hard patches mining adds a loss
    predictor, a decoder of the same size that reads the same embedded sequence.
    """

    def __init__(
        self,
        settings: ModelConfig,
        grid: TokenGrid,
        *,
        source_grid: TokenGrid | None = None,
        other_grids: Iterable[TokenGrid] = (),
        predictor: bool = True,
        target_width: int | None = None,
    ) -> None:
        """``target_width``: values predicted for each token; by default those of its patch."""
        super().__init__(
            settings, grid, source_grid=source_grid, other_grids=other_grids, init=None
        )
        decoder = settings.decoder
        make = partial(Decoder, decoder, checkpoint_activations=settings.checkpoint_activations)
        self.patch_values = settings.channels * math.prod(settings.patch_size)
        bias = settings.conventions == "mae"
        self.decoder_embed = nn.Linear(settings.encoder.dim, decoder.dim, bias=bias)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.dim))
        self.reconstructor = make(target_width or self.patch_values)
        self.difficulty_decoder = make(1) if predictor else None
        self.add_positions("decoder_pos_embed", decoder.dim)
        self._init_decoders()

    @property
    def decayed_tokens(self) -> tuple[str, ...]:
        """Names of the tokens that pre-training decays as if they were matrices."""
        return ("cls_token", "mask_token") if self.settings.conventions == "mae" else ()

    def forward(self, clips: Tensor, mask: TokenMask, keys: Tensor | None = None) -> Prediction:
        """Predictions for the hidden tokens of normalised clips.

        (B, C, T, H, W), a mask, (B,) keys of the clips -> (B, M, P) content, (B, M) difficulty

        The keys decide which residual branches stochastic depth drops; without them, none.
        """
        sequence = self._sequence(self.encode(clips, keys, mask), self.grid_of(clips), mask)
        content = self.reconstructor(sequence, self.num_prefix, mask)
        if self.difficulty_decoder is None:
            return Prediction(content, None)
        scores = self.difficulty_decoder(sequence, self.num_prefix, mask)
        return Prediction(content, scores.squeeze(-1))

    def score(self, encoded: Tensor, grid: TokenGrid, mask: TokenMask | None = None) -> Tensor:
        """Difficulty of every token, also of those that a mask hid from the encoder.

        (B, ., D), a mask or none -> (B, N). The teacher's call: it never runs the reconstructor.

        Raises:
            ValueError: the model has no loss predictor.
        """
        if self.difficulty_decoder is None:
            raise ValueError("this model has no loss predictor, so it cannot score tokens")
        sequence = self._sequence(encoded, grid, mask)
        return self.difficulty_decoder(sequence, self.num_prefix, None).squeeze(-1)

    def _sequence(self, encoded: Tensor, grid: TokenGrid, mask: TokenMask | None) -> Tensor:
        """What decoders read: the class token, then tokens and mask tokens at their positions."""
        embedded = self.decoder_embed(encoded)
        tokens, positions = self.of_clip(embedded), self.positions("decoder_pos_embed", grid)
        if mask is None:
            sequence = tokens + positions
        else:
            hidden = self.mask_token.to(tokens.dtype) + positions[mask.masked_ids]
            visible = tokens + positions[mask.visible_ids]
            sequence = mask.merge(visible, hidden.expand(len(visible), -1, -1))
        if self.num_prefix:
            first = embedded[:, : self.num_prefix].to(sequence.dtype)
            sequence = torch.cat([first, sequence], dim=1)
        return sequence

    def _init_decoders(self) -> None:
        """Draw initial weights; the embedding of VideoMAE's decoder keeps PyTorch's own."""
        self.init_encoder("xavier")
        init_linear(self.reconstructor)
        if self.settings.conventions == "mae":
            init_linear(self.decoder_embed)
            nn.init.normal_(self.mask_token, std=0.02)
        else:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        if self.difficulty_decoder is not None:
            init_linear(self.difficulty_decoder)
            head = self.difficulty_decoder.head
            # The official head has P outputs, xavier-uniform, and averages them: this is what it
            # folds to. Scores start nearly equal.
            values = self.patch_values
            std = math.sqrt(2 / (head.in_features + values)) / math.sqrt(values)
            nn.init.normal_(head.weight, std=std)
