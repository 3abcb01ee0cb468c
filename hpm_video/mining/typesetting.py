"""Text and images put together to pictures, on white paper."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

Colour = tuple[int, int, int]
PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 28, 32)


def font_of(file: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", file), size)


def draw_text(
    text: str,
    font: ImageFont.FreeTypeFont,
    colour: Colour = INK,
    *,
    width: int | None = None,
) -> Image.Image:
    """Text on white: wrapped to ``width``, which the image then has, or as wide as it comes."""
    lines = text.split("\n")
    if width is None:
        width = math.ceil(max(font.getlength(line) for line in lines))
    else:
        lines = [part for line in lines for part in _wrap(line, width, font)]
    leading = sum(font.getmetrics())
    image = Image.new("RGB", (max(width, 1), leading * len(lines)), PAPER)
    for index, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, index * leading), line, font=font, fill=colour)
    return image


def shorten(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Cut text that is wider than ``width``, and show that it was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break text between words into lines of at most ``width``."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def stack(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """One below the other, at the left edge."""
    return _in_a_row([image for image in images if image.height], gap, down=True)


def beside(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """One beside the other, at the upper edge."""
    return _in_a_row(images, gap, down=False)


def _in_a_row(images: Sequence[Image.Image], gap: int, *, down: bool) -> Image.Image:
    sizes = [image.size[::-1] if down else image.size for image in images]  # along the row first
    whole = sum(along + gap for along, _ in sizes) - gap, max(across for _, across in sizes)
    canvas, at = Image.new("RGB", whole[::-1] if down else whole, PAPER), 0
    for image, (along, _) in zip(images, sizes, strict=True):
        canvas.paste(image, (0, at) if down else (at, 0))
        at += along + gap
    return canvas


def pad(image: Image.Image, margin: int) -> Image.Image:
    """A white margin, and even sides, as H.264 wants them."""
    odd = (image.width % 2, image.height % 2)
    border = (margin, margin, margin + odd[0], margin + odd[1])
    return ImageOps.expand(image, border, PAPER)
