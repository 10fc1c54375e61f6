"""The candidates of the benchmark that measures the loading of photographs on one core.

`ours` does everything that a run does: it reads records, decodes and crops images in threads, and makes batches. The
other candidates are plain loops over encoded images, with a random crop of 224 pixels and a flip for each. Their images
are in memory, except for one candidate that reads records like `ours`.
"""

import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import PIL
import simplejpeg
from ml_collections import ConfigDict
from PIL import Image

from experiments.interleaved import Candidate, resident_bytes

SIZE = 224
COUNT = 256  # number of synthetic photographs, if no data set is given

Crop = tuple[int, int, int, int]  # top, left, height, width


def ours(records: Sequence[dict[str, Any]], config: ConfigDict, batch_size: int, steps: int) -> Callable[[], None]:
    """Streams `steps` batches in chunks of one, as a run on one core would."""
    from ddnp_jax import configure_cpu, data

    configure_cpu()  # as a run does: memory that a batch frees is kept for the next one
    images = data.Streamed(records, config)
    order = data.batches(np.arange(len(images)), batch_size, seed=0)
    first = 0

    def run_round() -> None:
        nonlocal first
        with data.read_ahead(order[first : first + steps], lambda draws: images.read(draws, 0), 1, 1) as chunks:
            for _ in chunks:
                first += 1

    return run_round


def loop(
    load: Callable[[bytes, Callable[[int, int], Crop], bool], np.ndarray],
    records: Sequence[dict[str, Any]],
    batch_size: int,
    steps: int,
) -> Callable[[], None]:
    """Loads `steps` batches image by image; `load` takes an encoded image, a function that draws a crop, and a flag.

    The flag is whether to flip the image.
    """
    from ddnp_jax.data import photos

    rng = np.random.default_rng(0)
    batch = np.empty((batch_size, SIZE, SIZE, 3), np.uint8)

    def run_round() -> None:
        for _ in range(steps):
            for i, which in enumerate(rng.integers(len(records), size=batch_size)):
                encoded = records[which]["image"]
                batch[i] = load(encoded, lambda *size: photos.draw_crop(rng, *size), rng.random() < 0.5)

    return run_round


def by_pillow(encoded: bytes, draw: Callable[[int, int], Crop], mirrored: bool) -> np.ndarray:
    """The transformations of torchvision as it applies them to Pillow's images."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    top, left, height, width = draw(image.height, image.width)
    image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)


def by_cv2(encoded: bytes, draw: Callable[[int, int], Crop], mirrored: bool) -> np.ndarray:
    """Decoding and cropping by cv2."""
    return _crop(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB), draw, mirrored)


def by_simplejpeg(encoded: bytes, draw: Callable[[int, int], Crop], mirrored: bool) -> np.ndarray:
    """Decoding by simplejpeg and cropping by cv2."""
    return _crop(simplejpeg.decode_jpeg(encoded), draw, mirrored)


def _crop(image: np.ndarray, draw: Callable[[int, int], Crop], mirrored: bool) -> np.ndarray:
    top, left, height, width = draw(*image.shape[:2])
    crop = cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE))
    return cv2.flip(crop, 1) if mirrored else crop


OURS, REFERENCE = "this project", "simplejpeg + cv2"
READING = f"{REFERENCE}, records read"
LOOPS = {REFERENCE: by_simplejpeg, READING: by_simplejpeg, "cv2": by_cv2, "Pillow": by_pillow}
VERSION = f"simplejpeg {simplejpeg.__version__}, cv2 {cv2.__version__}, Pillow {PIL.__version__}"


def candidate(name: str, data_dir: str, batch_size: int) -> Candidate:
    """A candidate of the loading of photographs.

    Args:
      name: `OURS` or a key of `LOOPS`.
      data_dir: Folder of prepared imagenet2012, or "".
      batch_size: Photographs per step.
    """
    steps = 20  # a run starts its threads once, so their start must not weigh
    about = {"platform": "cpu", "device": "1 core", "version": VERSION}
    run_round = make_round(name, data_dir, batch_size, steps)
    return Candidate(run_round, steps, resident_bytes, about, clock=time.process_time)  # whoever else uses the core


def make_round(name: str, data_dir: str, batch_size: int, steps: int) -> Callable[[], None]:
    """Returns a function that runs a round of a candidate, in one thread at a time.

    Args:
      name: `OURS` or a key of `LOOPS`.
      data_dir: Folder of a prepared imagenet2012, of which the loops in memory use at most the first 1,024 photographs;
        "" for synthetic photographs of 375 x 500 pixels, all in memory.
      batch_size: Number of photographs per step.
      steps: Number of steps per round.
    """
    cv2.setNumThreads(0)
    pixels = {
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "bgr": False,
        "flip": True,
        "crop_size": SIZE,
        "resize_size": 256,
        "threads": 1,
    }
    records = _records(data_dir)
    if name == OURS:
        return ours(records, ConfigDict(pixels), batch_size, steps)
    if name != READING:
        records = [records[i] for i in range(min(len(records), 4 * COUNT))]
    return loop(LOOPS[name], records, batch_size, steps)


def _records(data_dir: str) -> Any:
    if not data_dir:
        return [{"image": _photograph(i), "label": 0} for i in range(COUNT)]
    from ddnp_jax.data import prepared

    try:
        return prepared.open_records(prepared.open_builder("imagenet2012", data_dir), "train")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--data_dir={data_dir} holds no imagenet2012 that TFDS has prepared as array_record; give the folder that "
            "does, or leave it out for synthetic photographs."
        ) from error


def _photograph(seed: int) -> bytes:
    """A synthetic JPEG of about 100 kB, as in ImageNet: coarse shapes with noise."""
    rng = np.random.default_rng(seed)
    shapes = cv2.resize(rng.integers(0, 256, (12, 16, 3)).astype(np.float32), (500, 375), interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(shapes + rng.normal(0, 12, shapes.shape), 0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(noisy, quality=90, colorsubsampling="420")
