"""Preprocessing of stored images for the network."""

import dataclasses
from collections.abc import Sequence

from ddnp_jax.config import DataConfig
from ddnp_jax.fields import check_limits


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images, with the fields of a configuration's `data` section.

    Attributes:
      mean: Mean per channel for normalization, in units of [0, 1] and in the network's channel order.
      std: Standard deviation per channel, likewise.
      bgr: Whether the network takes BGR images.
      pad: Zero padding in pixels on each side before the random crop of small images.
      flip: Whether to flip half of the training images horizontally.
      crop_size: Side in pixels of the crops of photographs.
      resize_size: Shorter side in pixels of a photograph before the center crop of evaluation.
      threads: Number of decoder threads per process; 0 for one per core.
    """

    mean: Sequence[float]
    std: Sequence[float]
    bgr: bool = False
    pad: int = 4
    flip: bool = True
    crop_size: int = 224
    resize_size: int = 256
    threads: int = 0

    def __post_init__(self) -> None:
        """Converts mean and std, which may be any sequences or arrays of numbers, to tuples of floats."""
        for field in ("mean", "std"):
            object.__setattr__(self, field, tuple(map(float, getattr(self, field))))

    @classmethod
    def of(cls, config: DataConfig) -> "Preprocessing":
        """The fields of a `data` section."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    def check(self, name: str, channels: int, section: str = "") -> None:
        """Checks the values.

        Args:
          name: The data set's name.
          channels: Number of channels of its images.
          section: Prefix of field names in messages, "data." for a configuration.

        Raises:
          ValueError: A value is invalid; the message names the field and its valid values.
        """
        for field in ("mean", "std"):
            if not len(getattr(self, field)):
                raise ValueError(
                    f"{section}{field} of {name} is not known; give a value for each of its {channels} channels."
                )
            if len(getattr(self, field)) != channels:
                raise ValueError(
                    f"{section}{field} has {len(getattr(self, field))} entries; "
                    f"the images of {name} have {channels} channels."
                )
        check_limits(self, section, like=DataConfig)
        if self.bgr and channels != 3:
            raise ValueError(f"{section}bgr is for images of 3 channels; those of {name} have {channels}.")
        if self.crop_size > self.resize_size:
            raise ValueError(
                f"{section}crop_size={self.crop_size} must be from 1 to {section}resize_size={self.resize_size} pixels."
            )
