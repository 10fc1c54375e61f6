"""Photographs: every encoding is decoded as Pillow does, and crops are torchvision's."""

import io
import math
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ddnp_jax.data import photos


def encode(image, file_format="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def smooth(height, width, seed=0):
    """A coloured image without sharp edges."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def gradient(height, width):
    """An image whose red increases with the column, and green with the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([255 * columns / width, 255 * rows / height, np.full((height, width), 77)], -1).astype(np.uint8)


def by_pillow(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


ENCODINGS = {
    "JPEG": {"mode": "RGB"},
    "JPEG 4:4:4": {"mode": "RGB", "subsampling": 0},
    "progressive JPEG": {"mode": "RGB", "progressive": True},
    "grey JPEG": {"mode": "L"},
    "CMYK JPEG": {"mode": "CMYK"},
    "PNG": {"mode": "RGB", "file_format": "PNG"},
    "transparent PNG": {"mode": "RGBA", "file_format": "PNG"},
}


@pytest.mark.parametrize("options", ENCODINGS.values(), ids=ENCODINGS)
def test_decoded_pixels_are_pillows(options):
    encoded = encode(smooth(61, 83), **options)
    decoded = photos.decode(encoded)
    assert decoded.shape == (61, 83, 3) and decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, by_pillow(encoded))


def test_superfluous_bytes_are_no_damage():
    encoded = encode(smooth(40, 50))
    superfluous = encoded[:-2] + 99 * b"\1" + encoded[-2:]
    with pytest.raises(ValueError, match=r"^Corrupt JPEG data: .* extraneous bytes before marker 0xd9$"):
        photos.simplejpeg.decode_jpeg(superfluous)
    np.testing.assert_array_equal(photos.decode(superfluous), photos.decode(encoded))


@pytest.mark.parametrize("encoded", [b"", b"no image", encode(smooth(9, 9), mode="CMYK")[:300]])
def test_what_is_no_image_is_refused(encoded):
    with pytest.raises(ValueError, match=r"^[^<]+$"):
        photos.decode(encoded)


def test_large_photographs_are_decoded_at_a_fraction_of_their_size():
    encoded = encode(smooth(600, 800), quality=95)
    small = photos.decode(encoded, 300, 400)
    assert small.shape == (300, 400, 3)
    averaged = photos.decode(encoded).reshape(300, 2, 400, 2, 3).mean((1, 3))
    assert np.abs(small - averaged).max() < 4
    assert photos.decode(encoded, 301, 400).shape == (600, 800, 3)  # nothing between a half and the whole
    assert photos.decode(encoded, 75, 100).shape == (75, 100, 3)


# height, width -> size after Resize(256) and corner of CenterCrop(224), as (width, height) and (left, top): the longer
# side is rounded down, half a pixel goes to the even number
CENTERS = {
    (375, 500): ((341, 256), (58, 16)),
    (500, 333): ((256, 384), (16, 80)),
    (256, 355): ((355, 256), (66, 16)),
    (256, 256): ((256, 256), (16, 16)),
    (100, 60): ((256, 426), (16, 101)),
}


@pytest.mark.parametrize("options", [ENCODINGS["JPEG"], ENCODINGS["grey JPEG"], ENCODINGS["CMYK JPEG"]], ids=str)
@pytest.mark.parametrize("shape", CENTERS)
def test_center_crop_is_torchvisions(shape, options):
    encoded = encode(smooth(*shape), **options)
    size, (left, top) = CENTERS[shape]
    resized = Image.open(io.BytesIO(encoded)).convert("RGB").resize(size, Image.Resampling.BILINEAR)
    out = np.zeros((224, 224, 3), np.uint8)
    photos.center_crop(encoded, 256, out)
    np.testing.assert_array_equal(out, np.asarray(resized.crop((left, top, left + 224, top + 224))))


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**32))
@settings(deadline=None)
def test_random_crops_are_parts(height, width, seed):
    top, left, crop_height, crop_width = photos.draw_crop(np.random.default_rng(seed), height, width)
    assert 0 <= top <= top + crop_height <= height and crop_height > 0
    assert 0 <= left <= left + crop_width <= width and crop_width > 0


def test_random_crops_have_torchvisions_distribution():
    rng = np.random.default_rng(0)
    crops = np.array([photos.draw_crop(rng, 4000, 4000) for _ in range(20000)])
    top, left, height, width = crops.T
    area, ratio = height * width / 4000**2, np.log(width / height)
    # Small areas: every attempt fits, so area and log-ratio are uniform and independent, and places are uniform.
    small = area < 0.5
    np.testing.assert_allclose(np.quantile(area[small], [0, 0.25, 0.5, 0.75]), [0.08, 0.185, 0.29, 0.395], atol=0.01)
    bound = math.log(4 / 3)
    quartiles = np.quantile(ratio[small], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quartiles, bound * np.array([-1, -0.5, 0, 0.5, 1]), atol=0.02)
    assert abs(np.corrcoef(area[small], ratio[small])[0, 1]) < 0.03
    for place, room in ((top, 4000 - height), (left, 4000 - width)):
        np.testing.assert_allclose(
            np.quantile(place[small] / room[small], [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.02
        )
    assert area.max() > 0.97


def test_where_no_crop_fits_it_is_the_middle():
    rng = np.random.default_rng(0)
    assert photos.draw_crop(rng, 10, 1000) == (0, 493, 10, 13)
    assert photos.draw_crop(rng, 1000, 10) == (493, 0, 13, 10)


@pytest.mark.parametrize("shape", [(120, 180), (90, 60), (1500, 1100)], ids=["usual", "small", "partly decoded"])
def test_random_crop_shows_the_part_that_was_drawn(shape):
    encoded = encode(gradient(*shape), quality=95, subsampling=0)
    height, width = shape
    flips, reduced = 0, 0
    for seed in range(40):
        out = np.empty((64, 64, 3), np.uint8)
        photos.random_crop(encoded, np.random.default_rng(seed), True, out)
        top, left, crop_height, crop_width = photos.draw_crop(np.random.default_rng(seed), *shape)
        reduced += min(crop_height, crop_width) >= 128
        x = 255 * (left + (np.arange(64) + 0.5) / 64 * crop_width - 0.5) / width
        y = 255 * (top + (np.arange(64) + 0.5) / 64 * crop_height - 0.5) / height
        mirrored = out[0, 0, 0] > out[0, -1, 0]
        flips += mirrored
        np.testing.assert_allclose(out[:, ::-1, 0] if mirrored else out[..., 0], np.tile(x, (64, 1)), atol=4)
        np.testing.assert_allclose(out[..., 1], np.tile(y[:, None], (1, 64)), atol=4)
        assert np.abs(out[..., 2] - 77.0).max() <= 3
    assert 10 < flips < 30
    assert reduced > 30 if shape == (1500, 1100) else reduced == 0


def test_without_flip_nothing_is_mirrored():
    encoded = encode(gradient(50, 60))
    out = np.empty((16, 16, 3), np.uint8)
    for seed in range(20):
        photos.random_crop(encoded, np.random.default_rng(seed), False, out)
        assert out[0, 0, 0] <= out[0, -1, 0]


# --- every kind of image -------------------------------------------------------------------------------------------


def saved(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def noise(height, width, *channels, bits=8, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, (height, width, *channels), dtype=f"uint{bits}")


def over_white(colors, alpha):
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def test_transparent_images_are_laid_over_white():
    colors, alpha = noise(9, 7, 3), noise(9, 7, seed=1)
    expected = over_white(colors, alpha)
    for file_format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        encoded = saved(Image.fromarray(np.dstack([colors, alpha])), file_format, **options)
        np.testing.assert_allclose(photos.decode(encoded), expected, atol=1, err_msg=file_format)
    grey = saved(Image.merge("LA", (Image.fromarray(colors[..., 0]), Image.fromarray(alpha))))
    expected = over_white(colors[..., :1], alpha)
    np.testing.assert_allclose(photos.decode(grey), expected.repeat(3, -1), atol=1)
    np.testing.assert_allclose(photos.decode(grey, channels=1), expected, atol=1)


def palette(indices):
    image = Image.fromarray(indices)
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    return image


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palettes_are_looked_up_and_may_be_transparent(file_format):
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    colors = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]], np.uint8)
    np.testing.assert_array_equal(photos.decode(saved(palette(indices), file_format)), colors[indices])
    colors[1] = 255
    transparent = saved(palette(indices), file_format, transparency=1)
    np.testing.assert_array_equal(photos.decode(transparent), colors[indices])


def test_palettes_may_be_partly_transparent():
    encoded = saved(palette(np.array([[0, 1, 2]], np.uint8)), transparency=bytes([255, 128, 0]))
    expected = [[[10, 20, 30], over_white(np.array([200, 100, 50]), np.array(128)), [255, 255, 255]]]
    np.testing.assert_allclose(photos.decode(encoded), np.array(expected), atol=1)


def test_a_colour_may_be_transparent():
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    encoded = saved(Image.fromarray(pixels), transparency=(1, 2, 3))
    np.testing.assert_array_equal(photos.decode(encoded), [[[255, 255, 255], [4, 5, 6]]])


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(file_format):
    levels = np.array([[0, 128, 129, 257], [300, 32768, 65535, 65406]], np.uint16)
    expected = [[0, 0, 1, 1], [1, 128, 255, 254]]  # levels / 257, rounded
    decoded = photos.decode(saved(Image.fromarray(levels), file_format))
    np.testing.assert_array_equal(decoded, np.array(expected)[..., None].repeat(3, -1))


def test_sixteen_bits_may_be_transparent():
    levels = np.array([[0, 300, 65535]], np.uint16)
    encoded = saved(Image.fromarray(levels), transparency=300)
    np.testing.assert_array_equal(photos.decode(encoded, channels=1)[..., 0], [[0, 255, 255]])


def test_sixteen_bits_of_colour_are_scaled():
    levels = noise(5, 6, 3, bits=16)
    encoded = cv2.imencode(".png", levels)[1].tobytes()
    np.testing.assert_allclose(photos.decode(encoded), levels[..., ::-1] / 257, atol=1)


def test_one_bit_is_black_or_white():
    bits = np.array([[0, 1, 1], [1, 0, 0]], bool)
    for file_format in ("PNG", "TIFF", "BMP"):
        decoded = photos.decode(saved(Image.fromarray(bits), file_format))
        np.testing.assert_array_equal(decoded, 255 * bits[..., None].repeat(3, -1))


def test_webp_is_decoded():
    pixels = noise(12, 10, 3)
    np.testing.assert_array_equal(photos.decode(saved(Image.fromarray(pixels), "WEBP", lossless=True)), pixels)


def test_of_several_images_in_a_file_the_first_counts():
    first, second = (Image.fromarray(smooth(12, 10, seed=seed)) for seed in (0, 1))
    for file_format, options in (("WEBP", {"lossless": True}), ("TIFF", {}), ("MPO", {})):
        encoded = saved(first, file_format, save_all=True, append_images=[second], **options)
        with Image.open(io.BytesIO(encoded)) as image:
            assert image.n_frames == 2
            np.testing.assert_array_equal(photos.decode(encoded), np.asarray(image))


def test_cmyk_becomes_rgb():
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 0, 255]]], np.uint8)
    encoded = saved(Image.fromarray(inks, "CMYK"), "TIFF")
    np.testing.assert_array_equal(photos.decode(encoded), [[[255, 255, 255], [0, 255, 255], [255, 0, 255], [0, 0, 0]]])


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_grey_images_of_colours_are_their_luma(file_format):
    pixels = smooth(24, 40)
    encoded = saved(Image.fromarray(pixels), file_format, **({"quality": 95} if file_format == "JPEG" else {}))
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    decoded = photos.decode(encoded, channels=1)
    assert decoded.shape == (24, 40, 1) and decoded.dtype == np.uint8
    np.testing.assert_allclose(decoded[..., 0], luma, atol=1 if file_format == "PNG" else 4)
    assert photos.decode(saved(Image.fromarray(smooth(80, 60)), "JPEG"), 40, 30, channels=1).shape == (40, 30, 1)


# EXIF's orientation -> the upright image of the stored one
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: np.transpose(a, (1, 0, 2)),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.transpose(a, (1, 0, 2)), 2),
    8: lambda a: np.rot90(a, 1),
}


def oriented(pixels, orientation, file_format, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(pixels), file_format, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright(orientation):
    pixels = smooth(24, 40)
    upright = UPRIGHT[orientation](pixels)
    np.testing.assert_array_equal(photos.decode(oriented(pixels, orientation, "PNG")), upright)
    webp = oriented(pixels, orientation, "WEBP", lossless=True)
    np.testing.assert_array_equal(photos.decode(webp), upright)
    jpeg = oriented(pixels, orientation, "JPEG")
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))))
    np.testing.assert_array_equal(photos.decode(jpeg), turned)
    smallest, half = ((260, 360), (300, 400, 3)) if orientation < 5 else ((360, 260), (400, 300, 3))
    assert photos.decode(oriented(smooth(600, 800), orientation, "JPEG"), *smallest).shape == half


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_crops_are_of_the_upright_image(orientation):
    upright = gradient(1100, 1500)
    stored = UPRIGHT[{1: 1, 3: 3, 6: 8}[orientation]](upright)  # the inverse turns
    encoded = oriented(np.ascontiguousarray(stored), orientation, "JPEG", quality=95, subsampling=0)
    plain = encode(upright, quality=95, subsampling=0)
    for seed in range(10):
        out, expected = np.empty((2, 64, 64, 3), np.uint8)
        photos.random_crop(encoded, np.random.default_rng(seed), True, out)
        photos.random_crop(plain, np.random.default_rng(seed), True, expected)
        np.testing.assert_allclose(out.astype(int), expected, atol=4)
    photos.center_crop(encoded, 70, out)
    photos.center_crop(plain, 70, expected)
    np.testing.assert_allclose(out.astype(int), expected, atol=4)


def test_grey_crops_are_those_of_colours():
    encoded = encode(smooth(100, 80), mode="L", quality=95)
    for crop in (
        lambda out: photos.center_crop(encoded, 40, out),
        lambda out: photos.random_crop(encoded, np.random.default_rng(1), True, out),
    ):
        grey, colored = np.empty((32, 32, 1), np.uint8), np.empty((32, 32, 3), np.uint8)
        crop(grey)
        crop(colored)
        np.testing.assert_array_equal(grey, colored[..., :1])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damaged", [b"MM\0*\0\0\xff\xffgarbage", b"garbage and more"])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_turn_nothing(damaged, file_format):
    encoded = saved(Image.fromarray(smooth(20, 30)), file_format, exif=b"Exif\0\0" + damaged)
    np.testing.assert_array_equal(photos.decode(encoded), by_pillow(encoded))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.1, 0.3, 0.6, 0.9, 0.99])
def test_truncated_images_are_refused(file_format, part):
    encoded = saved(Image.fromarray(noise(64, 64, 3)), file_format)
    assert photos.decode(encoded).shape == (64, 64, 3)
    cut = encoded[: int(part * len(encoded))]
    out = np.empty((16, 16, 3), np.uint8)
    for use in (
        photos.decode,
        lambda cut: photos.center_crop(cut, 16, out),
        lambda cut: photos.random_crop(cut, np.random.default_rng(0), True, out),
    ):
        with pytest.raises(ValueError, match=r"^[^<]+$"):
            use(cut)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_zeroed_bytes_inside_a_jpeg_are_told(options):
    encoded = encode(smooth(600, 800), quality=95, **options)
    middle = len(encoded) // 2
    with pytest.raises(ValueError, match=r"^Corrupt JPEG data: "):
        photos.decode(encoded[:middle] + bytes(5000) + encoded[middle + 5000 :])


def with_size(jpeg, height, width):
    """A JPEG whose header declares another size."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


def png_of_size(height, width):
    """A PNG with a header and no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("size", [(9460, 9460), (65000, 65000)], ids=["just too large", "huge"])
@pytest.mark.parametrize("claim", [png_of_size, lambda *size: with_size(encode(smooth(8, 8)), *size)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_claim_to_be_huge_are_refused_by_their_header(claim, size, monkeypatch):
    encoded = claim(*size)
    monkeypatch.setattr(photos.simplejpeg, "decode_jpeg", None)  # nothing is decoded
    monkeypatch.setattr(Image.Image, "convert", None)
    sentence = r"(9460 x 9460|65000 x 65000) pixels are more than the limit of 89478485"
    with pytest.raises(ValueError, match=sentence + "|4225000000 pixels"):  # Pillow's own for a huge PNG
        photos.decode(encoded)


def test_what_would_be_resized_to_a_huge_image_is_refused():
    encoded = encode(smooth(2, 4000), "PNG")
    with pytest.raises(ValueError, match=r"^512000 x 256 pixels are more than"):
        photos.center_crop(encoded, 256, np.empty((224, 224, 3), np.uint8))


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (np.ones((4, 4), np.float32), "its pixels are floating-point numbers of unknown range"),
        (np.full((4, 4), 70000, np.int32), "its pixels are whole numbers outside of 0..65535"),
    ],
)
def test_pixels_of_unknown_range_are_refused(pixels, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        photos.decode(saved(Image.fromarray(pixels), "TIFF"))
