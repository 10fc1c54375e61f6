"""Decoding and cropping of images on the host: torchvision's two transformations for ImageNet.

Every image of every data set is decoded here, to 8 bits, upright and without transparency. JPEGs are decoded by
simplejpeg (libjpeg-turbo), whose pixels are those of Pillow bit for bit; what it does not know, CMYK and other formats,
by Pillow itself, which also reads every header.
"""

import io
import math
from typing import BinaryIO

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 2**28 // 3  # of an image: a small file can claim to be of any size; Pillow warns from here on
AREA = (0.08, 1.0)  # of a random crop, as a fraction of the photograph
ASPECT_RATIO = (3 / 4, 4 / 3)  # of a random crop, width / height
ATTEMPTS = 10  # to draw a random crop that fits

# EXIF's orientations that turn an image: whether rows and columns change places, then the steps along both.
_TURNS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}

cv2.setNumThreads(0)  # the callers are threads already


def center_crop(encoded: bytes, resize: int, out: np.ndarray) -> None:
    """Resizes the shorter side to `resize` and cuts out the middle: torchvision's Resize and CenterCrop, bit for bit.

    That is so where torchvision is given Pillow's images; its form for tensors rounds differently.

    Args:
      encoded: A photograph.
      resize: Pixels, at least the side of `out`.
      out: uint8 (S, S, C), RGB or grey; is overwritten.

    Raises:
      ValueError: It cannot be decoded.
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
    """Cuts out a part of random size, shape and place and resizes it: torchvision's RandomResizedCrop and flip.

    The distribution is torchvision's. The pixels differ: cv2 interpolates between the four nearest pixels where
    torchvision averages over all that a smaller pixel covers. A part that is at least twice as large as `out` is
    decoded at a fraction of its size (libjpeg averages there), which is faster and moves its edges by less than a
    pixel of that.

    Args:
      encoded: A photograph.
      rng: Draws size, shape, place and flip.
      flip: Whether to mirror left and right with probability 1/2.
      out: uint8 (S, S, C), RGB or grey; is overwritten.

    Raises:
      ValueError: It cannot be decoded.
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

    Area and logarithm of the aspect ratio are uniform; what fits is placed uniformly. Where nothing fits in `ATTEMPTS`
    attempts, it is the middle, at the nearest aspect ratio allowed.

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
    """Decodes an image, turned upright as its EXIF orientation says.

    Transparent images are laid over white, 16 bits are scaled to 8, palettes are looked up, CMYK becomes RGB; of an
    animation it is the first frame.

    Args:
      encoded: A JPEG, or another format that Pillow reads.
      min_height: With `min_width`: the result may be smaller than the image, but not than this.
      min_width: See `min_height`; 0 for the whole image.
      channels: 3 for RGB, where grey is repeated; 1 for grey, the luma of colors.

    Returns:
      uint8 (H, W, channels).

    Raises:
      ValueError: It is no image, is damaged, or has more than `MAX_PIXELS`.
    """
    return _Photograph(encoded).pixels(min_height, min_width, channels)


def check_header(path: str) -> None:
    """Checks that a file begins as an image does that `decode` takes; its pixels are not read.

    Raises:
      ValueError: It cannot be read, is no image, or has more than `MAX_PIXELS`.
    """
    try:
        with open(path, "rb") as file:
            _opened(file)
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error


def _opened(file: BinaryIO) -> tuple[Image.Image, tuple[bool, int, int]]:
    """An image whose header has been read, and how to turn it."""
    try:
        image = Image.open(file)
        _check_size(*image.size)
        return image, _TURNS.get(_orientation(image), (False, 1, 1))
    except UnidentifiedImageError as error:
        raise ValueError("it is not an image in a known format") from error
    except Exception as error:  # damaged files make Pillow's readers raise anything
        raise ValueError(_sentence(error)) from error


class _Photograph:
    """An encoded image whose header has been read.

    Attributes:
      size: Height and width in pixels, upright.
    """

    def __init__(self, encoded: bytes) -> None:
        self._image, self._turn = _opened(io.BytesIO(encoded))
        self._encoded = encoded
        self.size = self._image.size if self._turn[0] else self._image.size[::-1]

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
        """As it lies in the file, not turned."""
        image = self._image
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            # Between 1/2 and 1 libjpeg has no fast form.
            scaled = {"min_height": min_height, "min_width": min_width, "min_factor": 2} if min_height else {}
            try:
                return simplejpeg.decode_jpeg(self._encoded, "RGB" if channels == 3 else "GRAY", **scaled)
            except ValueError as error:
                if _is_damage(str(error)):
                    raise
        pixels = np.asarray(_opaque(image).convert("RGB" if channels == 3 else "L"))
        return pixels.reshape(*pixels.shape[:2], channels)


def _is_damage(warning: str) -> bool:
    """Whether a warning of libjpeg says that pixels are wrong, of which Pillow says nothing.

    Superfluous bytes before the end (marker 0xd9) follow the last pixel; ImageNet has files with some. Pillow refuses
    truncated files itself.
    """
    return warning.startswith("Corrupt JPEG data") and not warning.endswith("extraneous bytes before marker 0xd9")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data turn nothing; whether the pixels are damaged too is found out later
        return 1


def _opaque(image: Image.Image) -> Image.Image:
    """The image with 8 bits per channel, over white where it is transparent."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range no file states")
    if image.mode.startswith("I"):
        return _eight_bits(image)
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits; older versions of Pillow open it with 32."""
    levels = np.array(image, np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError("its pixels are whole numbers outside of 0..65535")
    levels[levels == image.info.get("transparency")] = 65535
    return Image.fromarray(np.round(levels / 257).astype(np.uint8))


def _without_grey_axis(image: np.ndarray) -> np.ndarray:
    return image[..., 0] if image.shape[-1] == 1 else image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} that are decoded")


def _sentence(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
