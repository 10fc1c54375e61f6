"""Photographs: every encoding is decoded as Pillow does, and crops are torchvision's."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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
    """Red grows by the column, green by the row."""
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
    np.testing.assert_array_equal(photos.decode(encoded[:-2] + b"\0\0\0" + encoded[-2:]), photos.decode(encoded))


@pytest.mark.parametrize("encoded", [b"", b"no image", encode(smooth(9, 9), mode="CMYK")[:300]])
def test_what_is_no_image_is_refused(encoded):
    with pytest.raises((ValueError, OSError)):
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
