"""What every test relies on: eight CPU devices, strict numerics, and the shared data where it is there."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).parents[1] / ".." / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and PyTorch weights; its users skip where there is none."""
    if not SHARED.exists():
        pytest.skip("no ../shared folder with images and weights beside the checkout")
    return SHARED.resolve()
