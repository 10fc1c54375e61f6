"""What every test relies on: eight CPU devices, strict numerics, and the shared data where it is there."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Compiling takes more time than computing here, so programs are compiled with few optimizations.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same programs: the workers of a run and the processes that tests start share one cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import flax.core
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many small objects: with Python's own threshold, garbage collection takes a tenth of the tests' time.
gc.set_threshold(50_000, 20, 50)


def _reuse_checked_shapes() -> None:
    """Lets flax trace an initializer once per shape instead of once per parameter and call.

    At every call of a network, flax compares the shape of each parameter with its initializer's result, which it
    traces for this: that is half of the time of tracing a network. Where the shape is the one that the same
    initializer gave before, nothing is left to check.
    """
    checked = flax.core.Scope.param
    shapes = {}

    def param(self: flax.core.Scope, name: str, init_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = (init_fn, str(args), str(kwargs))
        if self.has_variable("params", name) and key in shapes:
            value = self.get_variable("params", name)
            if getattr(value, "shape", None) == shapes[key]:
                self.reserve(name, "params")
                return value
        value = checked(self, name, init_fn, *args, **kwargs)
        shapes[key] = getattr(value, "shape", None)
        return value

    flax.core.Scope.param = param


_reuse_checked_shapes()

# The files that take longest, most of them with few tests: started first, so that the workers of a run end together.
LONGEST = (
    "test_backbones",
    "test_pipeline",
    "test_examples",
    "test_torch_weights",
    "test_docs",
    "test_benchmark",
    "test_public_zoo",
    "test_pruning",
    "test_compact",
    "test_wheel",
    "test_job_over_processes",
)

SHARED = Path(__file__).parents[1] / ".." / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the files of `LONGEST` to the front."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and PyTorch weights; its users skip where there is none."""
    if not SHARED.exists():
        pytest.skip("no ../shared folder with images and weights beside the checkout")
    return SHARED.resolve()
