"""Decoding and cropping of images on the host: torchvision's two transformations for ImageNet.

Every image of every data set is decoded here, to 8 bits, upright and without transparency. JPEGs are decoded by
simplejpeg (libjpeg-turbo), which gives exactly the same pixels as Pillow. CMYK images and other formats, which it does
not support, are decoded by Pillow, which also reads the headers of JPEGs that may have an orientation.
"""

import functools
import io
import math
from typing import BinaryIO

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 2**28 // 3  # limit for an image, because a small file can declare any size; Pillow warns above it
AREA = (0.08, 1.0)  # range of the area of a random crop, as a fraction of the photograph
ASPECT_RATIO = (3 / 4, 4 / 3)  # range of the aspect ratio of a random crop, width / height
ATTEMPTS = 10  # number of attempts to draw a random crop that fits

# How an image is turned upright: whether rows and columns are swapped, and the steps along the rows and columns.
_UPRIGHT = (False, 1, 1)
_TURNS = {  # by EXIF orientation
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}

cv2.setNumThreads(0)  # images are already decoded by several threads


def center_crop(encoded: bytes, resize: int, out: np.ndarray) -> None:
    """Resizes the shorter side to `resize` and crops the center, like torchvision's Resize and CenterCrop.

    The pixels are exactly those of torchvision for images of Pillow; for tensors, torchvision rounds differently.

    Args:
      encoded: An encoded photograph.
      resize: Shorter side in pixels after resizing, at least the side of `out`.
      out: Array for the result, uint8 (S, S, C), RGB or grey.

    Raises:
      ValueError: The photograph cannot be decoded.
    """
    image = decode(encoded, channels=out.shape[-1])
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter != resize:
        size = int(resize * width / shorter), int(resize * height / shorter)
        _check_size(*size)
        image = np.asarray(Image.fromarray(_without_grey_axis(image)).resize(size, Image.Resampling.BILINEAR))
    top, left = (round((side - len(out)) / 2.0) for side in image.shape[:2])
    out[:] = image[top : top + len(out), left : left + len(out)].reshape(out.shape)


def random_crop(encoded: bytes, rng: np.random.Generator, flip: bool, out: np.ndarray) -> None:
    """Crops a part of random size, shape and position and resizes it, like torchvision's RandomResizedCrop and flip.

    The crops have the same distribution as in torchvision, but the pixels differ: cv2 interpolates between the four
    nearest pixels, while torchvision averages over all pixels that a pixel of the result covers. If the crop is at
    least twice as large as `out`, the photograph is decoded at a fraction of its size (libjpeg averages the pixels).
    This is faster, and moves the edges of the crop by less than a pixel of the decoded image.

    Args:
      encoded: An encoded photograph.
      rng: Random generator for size, shape, position and flip.
      flip: Whether to flip horizontally with probability 1/2.
      out: Array for the result, uint8 (S, S, C), RGB or grey.

    Raises:
      ValueError: The photograph cannot be decoded.
    """
    size = len(out)
    photograph = _Photograph(encoded)
    height, width = photograph.size
    top, left, crop_height, crop_width = draw_crop(rng, height, width)
    scale = min(crop_height, crop_width) / size
    smallest = (math.ceil(height / scale), math.ceil(width / scale)) if scale >= 2 else (0, 0)
    image = photograph.pixels(*smallest, channels=out.shape[-1])
    rows, columns = image.shape[0] / height, image.shape[1] / width
    top, bottom = round(top * rows), round((top + crop_height) * rows)
    left, right = round(left * columns), round((left + crop_width) * columns)
    target = _without_grey_axis(out)
    cv2.resize(image[top:bottom, left:right], (size, size), dst=target, interpolation=cv2.INTER_LINEAR)
    if flip and rng.random() < 0.5:
        cv2.flip(target, 1, dst=target)


def draw_crop(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Draws a part of a photograph as torchvision's RandomResizedCrop does.

    The area and the logarithm of the aspect ratio are distributed uniformly, and so is the position of a crop that
    fits. If no crop fits after `ATTEMPTS` attempts, the center is taken, with the nearest allowed aspect ratio.

    Returns:
      Top, left, height and width in pixels.
    """
    narrow, wide = ASPECT_RATIO
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(narrow), math.log(wide)))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return int(top), int(left), crop_height, crop_width
    crop_height, crop_width = min(height, round(width / narrow)), min(width, round(height * wide))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def decode(encoded: bytes, min_height: int = 0, min_width: int = 0, channels: int = 3) -> np.ndarray:
    """Decodes an image, and turns it upright according to its EXIF orientation.

    Transparent images get a white background, 16 bits are scaled to 8, palettes and CMYK are converted to RGB, and the
    first frame of an animation is used.

    Args:
      encoded: A JPEG, or another format that Pillow reads.
      min_height: Minimum height of the result, which may be decoded at a fraction of the image's size; 0 to decode it
        at full size.
      min_width: Minimum width of the result, likewise.
      channels: 3 for RGB, with grey levels repeated; 1 for grey, with colors converted to their luma.

    Returns:
      The pixels, uint8 (H, W, channels).

    Raises:
      ValueError: The file is not an image, is damaged, or has more than `MAX_PIXELS`.
    """
    return _Photograph(encoded).pixels(min_height, min_width, channels)


def check_header(path: str) -> int:
    """Checks that the header of a file is that of an image that `decode` supports; the pixels are not read.

    Returns:
      The image's shorter side, in pixels.

    Raises:
      ValueError: The file cannot be read, is not an image, or has more than `MAX_PIXELS`.
    """
    try:
        with open(path, "rb") as file:
            return min(_opened(file)[0].size)
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error


def _opened(file: BinaryIO) -> tuple[Image.Image, tuple[bool, int, int]]:
    """Reads the header of an image; returns the image and the entry of `_TURNS` that turns it upright."""
    try:
        image = Image.open(file)
        _check_size(*image.size)
        return image, _TURNS.get(_orientation(image), _UPRIGHT)
    except UnidentifiedImageError as error:
        raise ValueError("it is not an image in a known format") from error
    except Exception as error:  # for damaged files, Pillow may raise any error
        raise ValueError(_sentence(error)) from error


class _Photograph:
    """An encoded image whose header has been read.

    Attributes:
      size: Height and width in pixels, upright.
    """

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded
        size = _plain_jpeg_size(encoded)
        if size:
            self.size, self._turn, self._is_jpeg = size, _UPRIGHT, True
        else:
            image, self._turn = self._by_pillow
            self.size = image.size if self._turn[0] else image.size[::-1]
            self._is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")

    @functools.cached_property
    def _by_pillow(self) -> tuple[Image.Image, tuple[bool, int, int]]:
        return _opened(io.BytesIO(self._encoded))

    def pixels(self, min_height: int, min_width: int, channels: int) -> np.ndarray:
        """As `decode`."""
        transposed, row_step, column_step = self._turn
        smallest = (min_width, min_height) if transposed else (min_height, min_width)
        try:
            image = self._stored(*smallest, channels)
        except Exception as error:  # as above
            raise ValueError(_sentence(error)) from error
        image = image.swapaxes(0, 1) if transposed else image
        return np.ascontiguousarray(image[::row_step, ::column_step])

    def _stored(self, min_height: int, min_width: int, channels: int) -> np.ndarray:
        """Decodes the pixels as they are stored, without turning them."""
        if self._is_jpeg:
            # libjpeg has no fast implementation for factors between 1/2 and 1.
            scaled = {"min_height": min_height, "min_width": min_width, "min_factor": 2} if min_height else {}
            try:
                return simplejpeg.decode_jpeg(self._encoded, "RGB" if channels == 3 else "GRAY", **scaled)
            except ValueError as error:
                if _is_damage(str(error)):
                    raise
        pixels = np.asarray(_opaque(self._by_pillow[0]).convert("RGB" if channels == 3 else "L"))
        return pixels.reshape(*pixels.shape[:2], channels)


def _plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG in RGB or grey that has no orientation; None for every other image.

    Pillow takes about a tenth of the time of decoding a small photograph for this. An orientation stands in a segment
    with the marker APP1, whose two bytes do not occur among the pixels; a JPEG with them anywhere is left to Pillow.
    """
    if not encoded.startswith(b"\xff\xd8") or b"\xff\xe1" in encoded:
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None  # Pillow may read it, or say what is wrong
    _check_size(width, height)
    return (height, width) if colors in ("YCbCr", "RGB", "Gray") else None


def _is_damage(warning: str) -> bool:
    """Whether a warning of libjpeg means that pixels are damaged, which Pillow does not report.

    Extraneous bytes before the end (marker 0xd9) are harmless, because they follow the last pixel; some files of
    ImageNet have them. For truncated files, Pillow itself raises an error.
    """
    return warning.startswith("Corrupt JPEG data") and not warning.endswith("extraneous bytes before marker 0xd9")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data are ignored; damaged pixels are detected when they are decoded
        return 1


def _opaque(image: Image.Image) -> Image.Image:
    """Converts an image to 8 bits per channel, with a white background if it is transparent."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        return _eight_bits(image)
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts a grey image of 16 bits to 8 bits; older versions of Pillow open it with 32 bits."""
    levels = np.array(image, np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError("its pixels are whole numbers outside of 0..65535")
    levels[levels == image.info.get("transparency")] = 65535
    return Image.fromarray(np.round(levels / 257).astype(np.uint8))


def _without_grey_axis(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.shape[-1] == 1 else image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")


def _sentence(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
