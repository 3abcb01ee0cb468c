"""The ways that tools/bench.py compares: making clips from a file, and computing the ranking loss.

For a training clip, the straightforward way crops and resizes whole frames one by one with Pillow,
and stacks them as standardised float32; for a test it opens the file once per view. Our readers
read and resize only the part that the crop shows, all frames at once, and keep it as uint8.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import softplus

from hpm_video.config.choices import DecoderName
from hpm_video.config.data import DataConfig
from hpm_video.data.reading import (
    EvalReader,
    Footage,
    Request,
    TrainReader,
    Views,
)
from hpm_video.data.transforms import Box, MultiScaleCrop, multi_scale_box, view_boxes
from hpm_video.decoding.locations import is_frame_folder
from hpm_video.decoding.reader import Frames
from hpm_video.decoding.registry import available_decoders, open_video
from hpm_video.mining.losses import ranking_loss
from hpm_video.randomness import generator

CLIP = DataConfig(num_frames=16, frame_stride=4, frame_size=(224, 224))
REPEATS = 4
Way = Callable[[Request], object]


def ways_to_decode(decoders: Sequence[DecoderName], views: Views) -> dict[str, dict[str, Way]]:
    """Return the ways to make a training clip and the views of a test, the plain one first.

    And, with the first decoder, the ways to make several clips of one file.
    """
    train: dict[str, Way] = {"straightforward": clip_plainly}
    if "torchcodec" in decoders:
        train["torchcodec's own resizing"] = clip_by_torchcodec
    test: dict[str, Way] = {"straightforward": partial(views_plainly, views)}
    for name in decoders:
        train[name] = TrainReader(CLIP, name, "", MultiScaleCrop(flip=False), same_frames=False)
        test[name] = EvalReader(CLIP, name, "", views)
    ways = {"one by one": False, "in one pass": True}
    several: dict[str, Way] = {
        name: partial(several_clips, train[decoders[0]], one) for name, one in ways.items()
    }
    return {"train": train, "test": test, f"{REPEATS} training clips": several}


def several_clips(reader: Way, together: bool, request: Request) -> None:  # noqa: FBT001 - by partial
    """Make clips of a file with starts of their own, out of one pass or of a pass each."""
    keys = tuple((*request.keys[0], repeat) for repeat in range(REPEATS))
    for chosen in [keys] if together else [(key,) for key in keys]:
        reader(replace(request, keys=chosen))


def footage(request: Request, count: int) -> Footage:
    """Return so many frames of the file that is requested."""
    return Footage(0, count, kept_every=request.kept_every)


def clip_plainly(request: Request) -> Tensor:
    """Make one clip from whole frames: -> (C, T, h, w) float32"""
    draw = generator("clip", *request.keys[0])
    frames = read_plainly(request.path, lambda count: footage(request, count).draw(CLIP, draw))
    box = multi_scale_box(frames.shape[1], frames.shape[2], CLIP.frame_size, draw)
    return with_pillow(frames, box)


def views_plainly(views: Views, request: Request) -> Tensor:
    """Open the file for each view: -> (R, C, T, h, w) float32"""
    made = []
    for clip, crop in product(range(views.clips), range(views.crops)):
        choose = partial(lambda clip, count: footage(request, count).views(CLIP, views)[clip], clip)
        frames = read_plainly(request.path, choose)
        boxes = view_boxes(frames.shape[1], frames.shape[2], CLIP.frame_size, views.crops)
        made.append(with_pillow(frames, boxes[crop]))
    return torch.stack(made)


def clip_by_torchcodec(request: Request) -> Tensor:
    """Make one clip from whole frames that the decoder resizes: -> (T, C, h, w) uint8"""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]
    from torchcodec.transforms import Resize  # type: ignore[import-not-found]

    resizing = [Resize(CLIP.frame_size)]
    decoder = VideoDecoder(request.path, num_ffmpeg_threads=1, transforms=resizing)
    indices = footage(request, len(decoder)).draw(CLIP, generator("clip", *request.keys[0]))
    clip: Tensor = decoder.get_frames_at(indices.tolist()).data
    return clip


def read_plainly(path: str, choose: Callable[[int], NDArray[np.int64]]) -> Frames:
    """Read whole frames with decord, as its documentation shows, or else with PyAV or Pillow."""
    if "decord" in available_decoders() and not is_frame_folder(path):
        import decord

        reader = decord.VideoReader(path, num_threads=1)
        frames: Frames = reader.get_batch(choose(len(reader)).tolist()).asnumpy()
        return frames
    with open_video(path) as video:
        return video.read(choose(video.num_frames))


def with_pillow(frames: Frames, box: Box) -> Tensor:
    """Crop, resize and standardise each frame by itself: (T, H, W, C) -> (C, T, h, w) float32"""
    part = (box.left, box.top, box.left + box.width, box.top + box.height)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CLIP.mean, CLIP.std))
    clip = []
    for frame in frames:
        image = Image.fromarray(frame).crop(part)
        image = image.resize(CLIP.frame_size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        clip.append((pixels - mean) / deviation)
    return torch.stack(clip, dim=1)


def loss_step(form: str, clips: int, tokens: int, device: torch.device) -> Callable[[], float]:
    """Return a step that computes the loss and its gradient, always for the same tokens."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(clips, tokens, generator=draw).to(device).requires_grad_()
    errors = torch.rand(clips, tokens, generator=draw).to(device)

    def step() -> float:
        scores.grad = None
        loss = LOSSES[form](scores, errors)
        torch.autograd.backward(loss)
        return float(loss.detach())  # waits for the device

    return step


def plain_ranking_loss(scores: Tensor, errors: Tensor) -> Tensor:
    """Compute the same loss as it is defined: (B, M), (B, M) -> ()

    -log sigmoid(s_i - s_j), which is softplus(s_j - s_i), averaged over ordered pairs e_i > e_j.
    """
    counted = errors[:, :, None] > errors[:, None, :]
    wrong_by = scores[:, None, :] - scores[:, :, None]
    return (softplus(wrong_by) * counted).sum() / counted.sum().clamp(min=1)


LOSSES = {"plain": plain_ranking_loss, "blockwise": ranking_loss}
