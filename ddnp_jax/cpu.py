"""Makes XLA faster on a machine without accelerator; called before JAX starts its devices.

    import ddnp_jax
    ddnp_jax.configure_cpu()

XLA gets its YNN fusions, where the installed jaxlib knows their flag: a child process finds that out once, and the
user's cache folder keeps it. Memory that a step frees is kept for the next step, which would spend up to half of its
time on page faults otherwise (measured in docs/performance.md). On an accelerator the same calls change nothing.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax._src.xla_bridge import backends_are_initialized  # no public module provides it

from ddnp_jax import files

AUTO = "auto"
FUSIONS = ("individual_convolution", "individual_dot", "dot", "eltwise", "reduce")  # that XLA:CPU knows

FUSION_TYPE = "--xla_cpu_experimental_ynn_fusion_type="
_DEVICE_COUNT = "--xla_force_host_platform_device_count"
# Numbers of glibc's mallopt: large blocks come from the heap, one heap serves all threads (a thread's own is too small
# for the block that a step of XLA takes), and what was freed is never handed back to the system.
_MALLOC = {"M_MMAP_MAX": (-4, 0), "M_ARENA_MAX": (-8, 1), "M_TRIM_THRESHOLD": (-1, -1)}

# XLA ends the process at a flag that it does not know.
_PROBE = "import jax; jax.jit(lambda x: x + 1)(1.0)"


def configure_cpu(devices: int = 1, fusions: str = AUTO) -> None:
    """Sets XLA's flags, threads and memory for this process, as was measured to be fastest; what XLA_FLAGS has stays.

    Where an accelerator's plugin is installed, or the environment sets glibc's memory (`MALLOC_*`, `GLIBC_TUNABLES`),
    memory is left as it is; elsewhere the process keeps the most memory that it has used until it ends, or until
    `hand_back_freed_memory`, which the job calls after every stage.

    Args:
      devices: Devices that the cores are shared by.
      fusions: What XLA may fuse: some of `FUSIONS`, joined by commas; "" for nothing, "auto" for what is fastest. With
        `eltwise`, which "auto" has, a ReLU makes 0 of NaN: look for NaN in variables, not in outputs; and jaxlib 0.12
        cannot compile `cholesky`, nor `eigh` where it symmetrizes its input. "dot,reduce" has neither limit, and
        training takes up to 1.7 of the time.

    Raises:
      ValueError: A fusion is unknown.
      RuntimeError: JAX has started its devices.
    """
    names = [] if fusions == AUTO else [name for name in fusions.split(",") if name]
    if unknown := [name for name in names if name not in FUSIONS]:
        raise ValueError(
            f"fusions names {unknown[0]!r}, which is unknown; join some of {', '.join(FUSIONS)} by commas, or leave it "
            f"at {AUTO!r}."
        )
    if backends_are_initialized():
        raise RuntimeError("configure_cpu() comes too late: JAX has started; call it before creating any array.")
    given = os.environ.get("XLA_FLAGS", "")
    if _DEVICE_COUNT not in given:
        jax.config.update("jax_num_cpu_devices", devices)
    added = [flag for flag in flags(fusions) if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
    # XLA's threads: with one for each device, linear algebra on all of them (HRank, CHIP) waits for itself.
    os.environ.setdefault("NPROC", str(cores() + 1))
    if not _accelerator_is_installed():
        _keep_freed_memory()


def _accelerator_is_installed() -> bool:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu") is not None


def _keep_freed_memory() -> None:
    """Keeps what a step frees for the next one; other systems than glibc's are left as they are."""
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not chosen:
        for parameter, value in _MALLOC.values():
            mallopt(parameter, value)


def hand_back_freed_memory() -> None:
    """Hands memory that is free back to the system, at the end of work whose steps have needed more than later ones.

    Does nothing on systems without glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def flags(fusions: str) -> list[str]:
    """XLA flags for fusions as in `configure_cpu`, as far as jaxlib knows them."""
    wanted = ",".join(FUSIONS) if fusions == AUTO else fusions
    return [FUSION_TYPE + wanted] if wanted and knows_fusions() else []


def description() -> str:
    """The processor's name, as the system gives it, and the cores that this process may use."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {cores()} cores"


def jit_for_one_call(program: Callable[..., Any]) -> Callable[..., Any]:
    """As `jax.jit`, for a program that runs once or seldom: on a CPU it is compiled with fewer optimizations, sooner.

    The initial random numbers of ResNet-56's kernels, for example, take 51 s to compile otherwise.
    """
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(program, compiler_options=options)


def has_avx512() -> bool:
    """Whether the processor is known to have AVX-512."""
    return "avx512f" in _cpuinfo("flags").split()


def _cpuinfo(field: str) -> str:
    """What Linux says of its first processor; "" for an unknown field and on other systems."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
    return ""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def knows_fusions() -> bool:
    """Whether the installed jaxlib knows the flag of the fusions; a child process finds it out once, and it is kept.

    Raises:
      RuntimeError: The child process failed in another way than by not knowing the flag.
    """
    path = files.user_cache() / f"cpu-{platform.machine()}-{jaxlib.__version__}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads(path.read_text())["knows_fusions"])
    found = _knows(FUSION_TYPE + "dot")
    with contextlib.suppress(OSError):  # where a home cannot be written to, it is found out each time
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, {"knows_fusions": found})
    return found


def _knows(flag: str) -> bool:
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True)
    if done.returncode and "Unknown flag" not in done.stderr:
        raise RuntimeError(f"JAX cannot compute on this CPU: {done.stderr.strip()[-400:]}")
    return done.returncode == 0
