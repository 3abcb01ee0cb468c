"""Images as videos of one frame. The tests make all files, with Pillow or byte by byte."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from hpm_video.decoding import image as decode_image
from hpm_video.decoding.locations import is_image
from hpm_video.decoding.reader import DecodeError
from hpm_video.decoding.registry import open_video

HEIGHT, WIDTH = 17, 26
ORIENTATION = 0x0112


def colours(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture unlike all its mirrored and turned versions: (H, W, 3)"""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x + y, 11 * y + x, 255 - 3 * x - 5 * y], axis=-1).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    """Read an image: (H, W, 3)"""
    with open_video(str(path)) as video:
        assert video.num_frames == 1
        frames = video.read([0])
    assert frames.dtype == np.uint8
    assert frames.shape[0] == 1
    assert frames.shape[3] == 3
    return frames[0]


def saved(path: Path, picture: Image.Image | np.ndarray, **options) -> Path:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)
    return path


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit grey with these chunks after its header."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (header, *chunks)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *((f"/data.mp4/a{suffix}", True) for suffix in (".jpg", ".JPEG", ".Png", ".webp", ".TIF")),
        *((f"a{suffix}", True) for suffix in (".bmp", ".tiff", ".ppm", ".pgm", ".jfif")),
        *((f"a.jpg{suffix}", False) for suffix in (".mp4", ".gif", "/a", "/video.avi")),
    ],
)
def test_a_suffix_says_what_an_image_is(path, expected):
    assert is_image(path) is expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.PNG", {}),
        ("a.bmp", {}),
        ("a.ppm", {}),
        ("a.tif", {}),
        ("a.TIFF", {"compression": "tiff_lzw"}),
        ("a.webp", {"lossless": True}),
        ("a png.jpg", {"format": "PNG"}),
    ],
)
def test_a_lossless_image_comes_back(tmp_path, name, options):
    path = saved(tmp_path / name, colours(), **options)
    with open_video(str(path), "decord") as video:
        frames = video.read([0, 0])
        assert np.array_equal(video.read([0]), frames[:1])  # also the second time
        assert frames.flags.writeable  # as torch requires
        with pytest.raises(IndexError, match=r"must lie in 0\.\.0"):
            video.read([1])
    assert np.array_equal(frames, np.stack([colours()] * 2))


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (1, 1)])
def test_one_pixel_wide_or_high(tmp_path, size):
    assert np.array_equal(read(saved(tmp_path / "a.png", colours(*size))), colours(*size))


def test_a_jpeg_is_what_pillow_makes_of_it(tmp_path):
    path = saved(tmp_path / "a.JPEG", colours(), quality=90)
    with Image.open(path) as image:
        assert np.array_equal(read(path), np.array(image))
    assert np.abs(read(path).astype(int) - colours()).mean() < 8


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"orientation": 6}]
)
def test_a_jpeg_is_the_same_as_an_image_and_as_a_frame(tmp_path, mode, options):
    exif = Image.Exif()
    exif[ORIENTATION] = options.get("orientation", 1)
    (tmp_path / "a").mkdir()
    picture = Image.fromarray(colours()).convert(mode)
    path = saved(tmp_path / "a" / "1.jpg", picture, exif=exif, **options)
    with open_video(f"{tmp_path}/a/") as video:
        assert np.array_equal(video.read([0])[0], read(path))


def test_a_damaged_frame_is_what_pillow_makes_of_it(tmp_path, capfd):
    data = bytearray(saved(tmp_path / "a.jpg", colours(64, 64), quality=100).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(range(200))
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").write_bytes(data)
    with open_video(f"{tmp_path}/b/") as video:
        assert np.array_equal(video.read([0])[0], read(tmp_path / "a.jpg"))
    assert "Corrupt JPEG data" in capfd.readouterr().err


def test_a_progressive_frame_that_lacks_steps_is_what_pillow_makes_of_it(tmp_path):
    (tmp_path / "b").mkdir()
    data = saved(tmp_path / "a.jpg", colours(64, 64), progressive=True).read_bytes()
    for path in (tmp_path / "a.jpg", tmp_path / "b" / "1.jpg"):
        path.write_bytes(data[: len(data) // 4] + b"\xff\xd9")
    with open_video(f"{tmp_path}/b/") as video:
        assert np.array_equal(video.read([0])[0], read(tmp_path / "a.jpg"))


@pytest.mark.parametrize("format_", ["JPEG", "TIFF"])
def test_cmyk(tmp_path, format_):
    """Cyan is 255 - red and so on, without black: a red corner stays red."""
    picture = Image.new("RGB", (16, 16), (200, 40, 60)).convert("CMYK")
    path = saved(tmp_path / "a.jpg", picture, format=format_)
    assert np.abs(read(path).astype(int) - (200, 40, 60)).max() <= 2


def test_ycck(tmp_path):
    """Photoshop writes CMYK converted to YCbCr, as the Adobe marker says."""
    stored = Image.new("RGB", (16, 16), (200, 40, 60)).convert("YCbCr").getpixel((0, 0))
    # Pillow inverts CMYK values when it writes them; the fourth value means no black.
    planes = Image.new("CMYK", (16, 16), (*(255 - value for value in stored), 0))
    buffer = io.BytesIO()
    planes.save(buffer, "JPEG", quality=100)
    data = bytearray(buffer.getvalue())
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    (tmp_path / "a.jpg").write_bytes(data)
    # libjpeg computes C = 255 - R. Adobe stores 255 - ink: so the ink is R, and the light 255 - R.
    expected = 255 - np.array([200, 40, 60])
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - expected).max() <= 3


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.pgm"])
def test_grey(tmp_path, name):
    grey = colours()[..., 0]
    picture = read(saved(tmp_path / name, grey))
    assert np.array_equal(picture[..., 0], picture[..., 1])
    assert np.array_equal(picture[..., 0], picture[..., 2])
    assert np.abs(picture[..., 0].astype(int) - grey).max() <= (8 if name == "a.jpg" else 0)


RAMP = np.array([[0, 1, 128, 129, 257, 32896, 65406, 65407, 65535]], np.uint16)
RAMP_IN_8_BITS = [0, 0, 0, 1, 1, 128, 254, 255, 255]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif", "a.pgm"])
def test_grey_of_16_bits_is_scaled_and_not_cut_off(tmp_path, name):
    path = tmp_path / name
    if name == "big_endian.tif":
        Image.frombytes("I;16B", (9, 1), RAMP.astype(">u2").tobytes()).save(path)
    elif name == "a.pgm":
        path.write_bytes(b"P5 9 1 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        saved(path, RAMP)
    picture = read(path)
    assert picture[0, :, 0].tolist() == RAMP_IN_8_BITS
    assert np.array_equal(picture, picture[..., :1].repeat(3, axis=-1))


def test_one_bit(tmp_path):
    bits = colours()[..., 0] > 50
    picture = read(saved(tmp_path / "a.png", bits))
    assert np.array_equal(picture, np.repeat(255 * bits[..., None], 3, axis=-1))


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00\x80"])
def test_a_palette_with_and_without_transparency(tmp_path, transparency):
    palette = [(250, 0, 5), (0, 250, 5), (7, 8, 250)]
    numbers = (np.mgrid[:4, :5].sum(axis=0) % 3).astype(np.uint8)
    image = Image.fromarray(numbers).convert("P")
    image.putdata(numbers.ravel().tolist())
    image.putpalette([value for colour in palette for value in colour])
    options = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(
        read(saved(tmp_path / "a.png", image, **options)), np.array(palette, np.uint8)[numbers]
    )


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_transparency_is_dropped(tmp_path, name):
    alpha = np.full((HEIGHT, WIDTH, 1), 90, np.uint8)
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path / name, np.concatenate([colours(), alpha], axis=-1), **options)
    assert np.array_equal(read(path), colours())
    if name != "a.webp":
        grey = colours()[..., :1]
        saved(path, np.concatenate([grey, alpha], axis=-1))
        assert np.array_equal(read(path), grey.repeat(3, axis=-1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "grey.png"])
def test_exif_orientation(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lying = colours().astype(np.uint16)[..., 0] * 257 if name == "grey.png" else colours()
    path = saved(tmp_path / name, lying, exif=exif)
    picture = read(path)
    with Image.open(path) as image:
        if name == "a.tif":
            image.load()  # this turns it upright
        expected = ImageOps.exif_transpose(image)
        expected = colours_of(expected)
    assert np.array_equal(picture, expected)
    if name in ("a.png", "a.tif"):
        turned = {1: colours(), 3: np.rot90(colours(), 2), 6: np.rot90(colours(), -1)}
        assert np.array_equal(picture, turned.get(orientation, picture))
        assert picture.shape[:2] == (HEIGHT, WIDTH)[:: 1 if orientation < 5 else -1]


def colours_of(image: Image.Image) -> np.ndarray:
    if image.mode == "I;16" or image.mode == "I":
        return (np.array(image) // 257).astype(np.uint8)[..., None].repeat(3, axis=-1)
    return np.array(image)


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",  # claims 65535 entries
        b"Exif\0\0nothing of the kind",
        # A good orientation, followed by an entry whose values lie outside the block.
        b"Exif\0\0II*\0\x08\0\0\0\x02\0"
        + struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
        + struct.pack("<HHII", 0x8769, 2, 900, 4000)
        + bytes(4),
    ],
)
def test_damaged_metadata_do_no_harm(tmp_path, block):
    """Several images of ImageNet have such metadata."""
    path = saved(tmp_path / "a.jpg", colours(), quality=95, exif=block)
    picture = read(path)
    if picture.shape[0] == WIDTH:
        picture = np.rot90(picture)
    assert np.abs(picture.astype(int) - colours()).mean() < 8


def whole(format_: str, **options) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, format_, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.998])
@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
)
def test_a_file_that_is_cut_off(tmp_path, format_, options, share):
    path = tmp_path / "a.jpg"
    data = whole(format_, **options)
    path.write_bytes(data)
    read(path)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DecodeError, match=r"cannot decode .*a\.jpg: it is .*cut off") as caught:
        read(path)
    assert "ownload it again" in caught.value.reason


def test_a_jpeg_without_its_end_says_what_to_do(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(whole("JPEG")[:-2])
    with pytest.raises(DecodeError, match=r"end is missing\. Download it again, or save it again"):
        read(path)


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (b"IHDR", r"it is no image of .*, or it is cut off or damaged; download it again"),
        (b"IDAT", r"it is cut off or damaged: .*; download it again"),
    ],
)
def test_a_png_with_a_wrong_checksum(tmp_path, chunk, reason):
    data = bytearray(whole("PNG"))
    behind = data.index(chunk) - 4
    size = int.from_bytes(data[behind : behind + 4], "big")
    data[behind + 8 + size] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DecodeError, match=reason):
        read(tmp_path / "a.png")


def test_a_codec_that_pillow_lacks_is_no_damage(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", colours())

    def load(_: Image.Image) -> None:
        raise OSError("decoder jpeg_2000 not available")

    monkeypatch.setattr(Image.Image, "load", load)
    with open_video(str(path)) as video, pytest.raises(DecodeError) as caught:
        video.read([0])
    assert caught.value.reason == "OSError: decoder jpeg_2000 not available"


def test_pixels_are_not_copied(tmp_path, monkeypatch):
    pixels = colours()
    monkeypatch.setattr(decode_image, "_rgb", lambda _: pixels)
    assert np.shares_memory(read(saved(tmp_path / "a.png", pixels)), pixels)


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_a_file_whose_end_is_zeros(tmp_path, format_):
    """A broken download leaves such a file if it had reserved the space on the disk."""
    data = whole(format_)
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(DecodeError, match="cannot decode"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "there is no such file"),
        (b"", "the file is empty"),
        (b"I am no image\n" * 50, "it is no image of the formats JPEG, PNG, BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" * 9, "it is no image"),
        (png(20000, 20000, (b"IDAT", zlib.compress(bytes(99)))), "400000000 pixels"),
        (png(4, 4, (b"IDAT", zlib.compress(bytes(6))), (b"IEND", b"")), "truncated"),
    ],
)
def test_what_is_no_image(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DecodeError) as caught:
        read(path)
    assert str(caught.value).startswith(f"cannot decode {path}: ")
    assert caught.value.path == str(path)
    assert reason in caught.value.reason


def test_a_folder_named_like_an_image(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(DecodeError, match=r"a\.jpg: it is a folder"):
        read(tmp_path / "a.jpg")


def test_a_large_picture_is_read_without_a_warning(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", colours())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    assert np.array_equal(read(path), colours())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)
    with pytest.raises(DecodeError, match=f"too many pixels.*{HEIGHT * WIDTH} pixels.*Shrink it"):
        read(path)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "TIFF", "GIF"])
def test_several_pictures_are_refused(tmp_path, format_):
    path = tmp_path / "a.png"
    first, second = Image.fromarray(colours()), Image.fromarray(colours()[::-1].copy())
    first.save(path, format_, save_all=True, append_images=[second, first])
    with pytest.raises(DecodeError, match=r"it holds 3 pictures, .* Save one of them"):
        read(path)


def test_a_telephones_pictures_give_the_first(tmp_path):
    path = tmp_path / "a.jpg"
    first, second = Image.fromarray(colours()), Image.new("RGB", (8, 8))
    first.save(path, "MPO", save_all=True, append_images=[second], quality=95)
    with Image.open(path) as image:
        assert image.n_frames == 2
        assert np.array_equal(read(path), np.array(image))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.linspace(0, 1, 12, dtype=np.float32), "its values are float32 from 0 to 1"),
        (np.arange(12, dtype=np.int32) * 10000, "its values are int32 from 0 to 110000"),
        (np.arange(12, dtype=np.int32) - 5, "from -5 to 6, and nothing says which is white"),
    ],
)
def test_pixels_whose_range_is_unknown(tmp_path, values, reason):
    path = saved(tmp_path / "a.tif", values.reshape(3, 4))
    with pytest.raises(DecodeError, match=reason):
        read(path)


@pytest.mark.slow
def test_images_need_no_decoder_of_videos(tmp_path):
    path = saved(tmp_path / "a.png", colours())
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('av', 'decord', 'torch', 'torchcodec')))\n"
        "from hpm_video.decoding import registry as decode\n"
        "print(decode.available_decoders(), 'PIL.Image' in sys.modules)\n"
        f"print(decode.open_video({str(path)!r}, 'pyav').read([0]).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["() False", f"(1, {HEIGHT}, {WIDTH}, 3)"]
