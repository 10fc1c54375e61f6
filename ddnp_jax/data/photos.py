"""Encoded photographs to square crops, on the host: torchvision's two transformations of ImageNet.

JPEGs are decoded by simplejpeg (libjpeg-turbo), whose pixels are those of Pillow bit for bit; what it does not know,
CMYK and other formats, by Pillow itself.
"""

import io
import math

import cv2
import numpy as np
import simplejpeg
from PIL import Image

AREA = (0.08, 1.0)  # of a random crop, as a fraction of the photograph
ASPECT_RATIO = (3 / 4, 4 / 3)  # of a random crop, width / height
ATTEMPTS = 10  # to draw a random crop that fits

cv2.setNumThreads(0)  # the callers are threads already


def center_crop(encoded: bytes, resize: int, out: np.ndarray) -> None:
    """Resizes the shorter side to `resize` and cuts out the middle: torchvision's Resize and CenterCrop, bit for bit.

    That is so where torchvision is given Pillow's images; its form for tensors rounds differently.

    Args:
      encoded: a photograph.
      resize: pixels, at least the side of `out`.
      out: uint8 (S, S, 3), RGB; is overwritten.
    """
    image = decode(encoded)
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter != resize:
        size = int(resize * width / shorter), int(resize * height / shorter)
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    top, left = (round((side - len(out)) / 2.0) for side in image.shape[:2])
    out[:] = image[top : top + len(out), left : left + len(out)]


def random_crop(encoded: bytes, rng: np.random.Generator, flip: bool, out: np.ndarray) -> None:
    """Cuts out a part of random size, shape and place and resizes it: torchvision's RandomResizedCrop and flip.

    The distribution is torchvision's. The pixels differ: cv2 interpolates between the four nearest pixels where
    torchvision averages over all that a smaller pixel covers. A part that is at least twice as large as `out` is
    decoded at a fraction of its size (libjpeg averages there), which is faster and moves its edges by less than a
    pixel of that.

    Args:
      encoded: a photograph.
      rng: of size, shape, place and flip.
      flip: whether to mirror left and right with probability 1/2.
      out: uint8 (S, S, 3), RGB; is overwritten.
    """
    size = len(out)
    height, width = _size(encoded)
    top, left, crop_height, crop_width = draw_crop(rng, height, width)
    scale = min(crop_height, crop_width) / size
    image = decode(encoded, *((math.ceil(height / scale), math.ceil(width / scale)) if scale >= 2 else ()))
    rows, columns = image.shape[0] / height, image.shape[1] / width
    top, bottom = round(top * rows), round((top + crop_height) * rows)
    left, right = round(left * columns), round((left + crop_width) * columns)
    cv2.resize(image[top:bottom, left:right], (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
    if flip and rng.random() < 0.5:
        cv2.flip(out, 1, dst=out)


def draw_crop(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Draws a part of a photograph as torchvision's RandomResizedCrop does.

    Area and logarithm of the aspect ratio are uniform; what fits is placed uniformly. Where nothing fits in `ATTEMPTS`
    attempts, it is the middle, at the nearest aspect ratio allowed.

    Returns:
      Top, left, height and width in pixels.
    """
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(*map(math.log, ASPECT_RATIO)))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return int(top), int(left), crop_height, crop_width
    narrow, wide = ASPECT_RATIO
    crop_height, crop_width = min(height, round(width / narrow)), min(width, round(height * wide))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def decode(encoded: bytes, min_height: int = 0, min_width: int = 0) -> np.ndarray:
    """Decodes a photograph.

    Args:
      encoded: JPEG of any colours, or another format that Pillow reads.
      min_height: with `min_width`: the result may be smaller than the photograph, but not than this.
      min_width: see `min_height`; 0 for the whole photograph.

    Returns:
      uint8 (H, W, 3), RGB; grey is repeated.

    Raises:
      ValueError, OSError: it is damaged.
    """
    if _is_plain_jpeg(encoded):
        # Not strict, because ImageNet holds files with superfluous bytes. Between 1/2 and 1 libjpeg has no fast form.
        scaled = {"min_height": min_height, "min_width": min_width, "min_factor": 2} if min_height else {}
        return simplejpeg.decode_jpeg(encoded, "RGB", strict=False, **scaled)
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def _size(encoded: bytes) -> tuple[int, int]:
    """Height and width, from the header alone."""
    if _is_plain_jpeg(encoded):
        return simplejpeg.decode_jpeg_header(encoded, strict=False)[:2]
    with Image.open(io.BytesIO(encoded)) as image:
        return image.height, image.width


def _is_plain_jpeg(encoded: bytes) -> bool:
    if not simplejpeg.is_jpeg(encoded):
        return False
    colors = simplejpeg.decode_jpeg_header(encoded, strict=False)[2]
    return colors not in ("CMYK", "YCCK")
