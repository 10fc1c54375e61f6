"""Flags of XLA on a CPU, and what the installed jaxlib can do."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jaxlib
import numpy as np
import pytest

from ddnp_jax import cpu
from tests import fused_searches

ROOT = Path(__file__).parents[1]
FUSION = "--xla_cpu_experimental_ynn_fusion_type="


def in_a_process(code, tmp_path, **environment):
    """Runs lines in a process whose JAX has not started; returns what they print."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )


def test_flags_for_what_a_jaxlib_knows(monkeypatch):
    everything = "individual_convolution,individual_dot,dot,eltwise,reduce"
    for known, wanted, flags in (
        (True, "auto", [FUSION + everything]),
        (True, "dot", [FUSION + "dot"]),
        (True, "", []),
        (False, "auto", []),
        (False, "dot", []),
    ):
        monkeypatch.setattr(cpu, "knows_fusions", lambda known=known: known)
        assert cpu.flags(wanted) == flags


def test_the_installed_jaxlib_computes_with_the_flags(tmp_path):
    code = (
        "import jax, os, ddnp_jax; ddnp_jax.configure_cpu(2); print(os.environ['XLA_FLAGS']); "
        "print(jax.device_count(), float(jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))[0, 0]))"
    )
    done = in_a_process(code, tmp_path)
    flags, computed = done.stdout.splitlines()
    assert computed == "2 3.0"
    (kept,) = (tmp_path / "ddnp_jax").iterdir()
    assert jaxlib.__version__ in kept.name
    assert json.loads(kept.read_text()) == {"knows_fusions": True}
    assert flags.split() == cpu.flags("auto")


def test_every_method_compiles_with_the_fusions_and_finds_the_same():
    """jaxlib can compile less with them: `eigh` not as it is called usually, in 0.12."""
    if not cpu.knows_fusions():
        pytest.skip("this jaxlib has no fusions")
    command = [sys.executable, "-m", "tests.fused_searches"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    fused, plain = json.loads(done.stdout), fused_searches.found()
    assert fused.keys() == plain.keys()
    for name, gates in plain.items():
        for ours, theirs in zip(fused[name], gates, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=name)


_FAULTS = """
import resource, jax, jax.numpy as jnp, ddnp_jax
ddnp_jax.configure_cpu()
step = jax.jit(lambda x: jnp.sort(x * 2.0, axis=0) @ x.T)  # takes 64 MiB, 16384 pages, and frees them
def faults(x):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
x = jnp.ones((4096, 64))
# In a heap that is still in pieces a step may take new pages: on a busy machine, each of the first eight did once.
print(max(faults(x) for _ in range(3)), min(faults(x) for _ in range(30)))
"""


def _pages_are_small():
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return platform.libc_ver()[0] == "glibc" and not (path.exists() and "[always]" in path.read_text())


@pytest.mark.skipif(not _pages_are_small(), reason="another libc, or pages so large that their number says nothing")
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_ARENA_MAX": "8"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}])
def test_memory_of_a_step_is_kept_for_the_next_one(tmp_path, chosen):
    first, later = map(int, in_a_process(_FAULTS, tmp_path, **chosen).stdout.split())
    assert first > 10_000
    assert (later < 1_000) == (not chosen)


_RESIDENT = """
import time, jax, jax.numpy as jnp, ddnp_jax
from ddnp_jax import cpu
ddnp_jax.configure_cpu()
def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 2**20
step = jax.jit(lambda x: jnp.sum(jnp.sort(x * 2.0, axis=0)))
step(jnp.ones((512, 65536))).block_until_ready()  # 128 MiB and more
kept, until = resident(), time.monotonic() + 60
while kept - resident() < 200 and time.monotonic() < until:  # XLA frees the memory a little after the result is there
    cpu.hand_back_freed_memory()
print(kept, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_kept_memory_is_handed_back_when_a_stage_ends(tmp_path):
    done = in_a_process(_RESIDENT, tmp_path)
    kept, left = map(float, done.stdout.split())
    assert kept - left >= 200, (kept, left)  # MiB


def test_memory_is_left_alone_beside_an_accelerator(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(cpu.importlib.metadata, "entry_points", lambda group: [group])
    assert cpu._accelerator_is_installed()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not cpu._accelerator_is_installed()


@pytest.fixture
def forget():
    """Clears the cached list of the flags that jaxlib supports, so that it is determined again."""
    yield cpu.knows_fusions.cache_clear
    cpu.knows_fusions.cache_clear()


def test_what_was_found_out_is_not_found_out_again(tmp_path, monkeypatch, forget):
    forget()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_knows", {cpu.FUSION_TYPE + "dot": True}.get)
    assert cpu.knows_fusions()
    monkeypatch.delattr(cpu, "_knows")
    forget()
    assert cpu.knows_fusions()
    (kept,) = (tmp_path / "ddnp_jax").iterdir()
    monkeypatch.setattr(cpu, "_knows", lambda flag: False, raising=False)
    for damaged in ("{}", "[]", "{"):  # found out again
        kept.write_text(damaged)
        forget()
        assert not cpu.knows_fusions()
        assert json.loads(kept.read_text()) == {"knows_fusions": False}


def test_a_flag_that_xla_does_not_know_is_not_given(monkeypatch):
    assert not cpu._knows("--xla_cpu_of_a_later_version=true")
    monkeypatch.setattr(cpu, "_PROBE", "raise SystemExit('no memory')")
    with pytest.raises(RuntimeError, match="JAX cannot compute on this CPU: no memory"):
        cpu._knows(cpu.FUSION_TYPE + "dot")


@pytest.mark.parametrize("flags", ["", "--xla_force_host_platform_device_count=2"])
def test_it_is_refused_after_jax_has_started(flags, tmp_path):
    done = in_a_process("import jax, ddnp_jax; jax.devices(); ddnp_jax.configure_cpu()", tmp_path, XLA_FLAGS=flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: configure_cpu() comes too late")


@pytest.mark.parametrize("fusions", ["auto,dot", "dots", "dot,auto"])
def test_unknown_fusions_are_refused(fusions):
    with pytest.raises(ValueError, match=r"fusions names '\w+', which is unknown; join some of individual_conv"):
        cpu.configure_cpu(fusions=fusions)


def test_given_flags_stay(tmp_path):
    given = f"--xla_force_host_platform_device_count=3 {FUSION}reduce"
    code = "import jax, os, ddnp_jax; ddnp_jax.configure_cpu(2); print(jax.device_count(), os.environ['XLA_FLAGS'])"
    devices, *flags = in_a_process(code, tmp_path, XLA_FLAGS=given).stdout.split()
    assert devices == "3" and flags == given.split()
