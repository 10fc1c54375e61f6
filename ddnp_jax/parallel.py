"""Devices and processes: runs a step that is written for a single device on all devices of all processes.

States are replicated, and batches are split over a mesh with a single axis. Only this module uses the axis; a step
receives `Devices`.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import ClusterEnv  # no public module provides it
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddnp_jax import relay

AXIS = "data"
MODES = ("shard_map", "pmap")  # values of `mode` of `data_parallel`
HEARTBEAT_SECONDS = 30  # a process without a heartbeat for this time counts as dead
_REPLICATED = PartitionSpec()
_SPLIT = PartitionSpec(None, AXIS)  # (chunk, batch, ...): the batch axis

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class Devices(NamedTuple):
    """The functions and names with which a step on one device's share of a batch communicates with the other devices.

    Attributes:
      mean: Computes the mean of a pytree of arrays over all devices.
      number: Returns the index of the device that the step runs on.
      batch_axis: Name of the mapped axis over which batch normalization averages; None to average only over the
        device's own share of the batch.
    """

    mean: Callable[[Any], Any]
    number: Callable[[], jax.Array | int]
    batch_axis: str | None


ONE_DEVICE = Devices(mean=lambda tree: tree, number=lambda: 0, batch_axis=None)
OVER_DEVICES = Devices(
    mean=lambda tree: jax.lax.pmean(tree, AXIS), number=lambda: jax.lax.axis_index(AXIS), batch_axis=AXIS
)


def description() -> str:
    """The devices of all processes in words: their number and kind."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def sum_over_devices(tree: Any) -> Any:
    """Sum of a pytree of arrays over all devices; only inside a function that `data_parallel` maps."""
    return jax.lax.psum(tree, AXIS)


def initialize(
    distributed: bool,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> relay.Relay | None:
    """Connects this process with the others of the run; must be called before any device is used.

    Afterwards, if another process ends prematurely, this process soon ends too, with a message and the exit code
    `ending.RESUMABLE`.

    Args:
      distributed: Whether the run has several processes; if False, the function does nothing.
      coordinator_address: Address 'host:port' of process 0. None, as for the next two arguments, on TPU, Slurm and
        Kubernetes, where JAX detects all three.
      num_processes: Number of processes of the run.
      process_id: Number of this process, from 0.

    Returns:
      The relay, which detects whether another process has ended; None if the run has a single process.

    Raises:
      ValueError: Only some of the last three arguments are given, one of them is given although `distributed` is
        False, or the address is invalid or in use.
    """
    given: dict[str, Any] = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if not distributed and len(missing) < 3:
        name = next(name for name in given if name not in missing)
        raise ValueError(f"{name} is set but distributed is False; set distributed=True or leave {name} out.")
    if 0 < len(missing) < 3:
        raise ValueError(f"{' and '.join(missing)} missing: set all of {', '.join(given)}, or none of them.")
    if not distributed:
        return None
    if missing:
        given = _found(given)
    host, _, port = given["coordinator_address"].rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ValueError(f"coordinator_address={coordinator_address!r} must be the host:port of process 0.")
    way = relay.Relay(given["coordinator_address"], given["process_id"])
    address = {"coordinator_address": way.address, "coordinator_bind_address": way.address}
    # Longer than the relay waits, because jaxlib aborts the process after a timeout.
    timeouts = {
        "initialization_timeout": 600 + relay.JOINING_SECONDS,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
    }
    jax.distributed.initialize(**given | address | timeouts)
    way.joined = True
    return way


def _found(names: Iterable[str]) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` as JAX detects them on a TPU pod, under Slurm or Kubernetes."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = ClusterEnv.auto_detect_unset_distributed_params(address, None, None, None, None, relay.JOINING_SECONDS)
    if None in found[:3]:
        raise ValueError(f"no cluster was found here; give {', '.join(names)}.")
    return dict(zip(names, found, strict=False))  # the last entry, the devices of this process, is not needed


def check_devices() -> None:
    """Checks that JAX can initialize the requested devices.

    Raises:
      ValueError: A requested platform, for example by JAX_PLATFORMS, is not available.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError for a known platform without a driver
        said = str(error).partition(". (set JAX_PLATFORMS=")[0]
        reason = f" ({said})" if said else ""
        asked = jax.config.values["jax_platforms"]
        raise ValueError(
            f"JAX finds no device of JAX_PLATFORMS={asked!r}{reason}; leave it unset to use the "
            "available devices, or install JAX for this platform."
        ) from error


def mesh() -> Mesh:
    """All devices of all processes along one axis."""
    return Mesh(np.array(jax.devices()), (AXIS,), axis_types=(AxisType.Auto,))


def check_batch(batch_size: int, name: str) -> None:
    """Checks that a batch can be divided equally among the devices.

    Args:
      batch_size: Images per step over all devices.
      name: Name of the configuration field with the batch size, for the message.

    Raises:
      ValueError: `batch_size` is not a positive multiple of the number of devices.
    """
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        nearest = max(round(batch_size / devices), 1) * devices
        raise ValueError(f"{name}={batch_size} cannot be shared equally by {devices} devices; use {nearest}, say.")


def replicate(tree: Any) -> Any:
    """Copies a pytree of arrays, the same in every process, to every device; the copies may be donated."""
    return jax.device_put(fetch(tree), NamedSharding(mesh(), _REPLICATED))


def shard_batches(tree: Any) -> Any:
    """Puts batches on the devices that process them.

    Args:
      tree: Pytree of host arrays (chunk, batch / processes, ...), this process's part of every batch.

    Returns:
      The same pytree as global arrays (chunk, batch, ...), split over the devices along axis 1.
    """
    sharding = NamedSharding(mesh(), _SPLIT)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def fetch(tree: Any) -> Any:
    """Copies a pytree of replicated (or local) arrays to the host as numpy arrays that outlive donation.

    Random keys remain JAX keys, copied to the current device.
    """

    def copy(x: Any) -> Any:
        if is_key(x):
            data = np.array(jax.device_get(jax.random.key_data(x)))
            return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(x))
        return np.array(jax.device_get(x))

    return jax.tree.map(copy, tree)


def is_key(x: Any) -> bool:
    """Whether an array holds typed random keys, as the state of flax.nnx modules may; numpy has no such type."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def process() -> tuple[int, int]:
    """Index of this process and number of processes."""
    return jax.process_index(), jax.process_count()


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; every process must call this, and all get the same result."""
    if jax.process_count() == 1:
        return flag
    with jax.transfer_guard("allow"):  # the gather transfers one byte per process implicitly
        return bool(multihost_utils.process_allgather(np.array(flag)).any())


def on_first_process(write: Callable[[], Any]) -> None:
    """Calls `write` in the first process only; the other processes wait for it. Every process must call this function.

    Raises:
      OSError: In the other processes, if `write` failed. In the first process, the error of `write` is raised.
    """
    error = None
    if jax.process_index() == 0:
        try:
            write()
        except Exception as caught:  # any error, so that the other processes do not wait forever
            error = caught
    if any_process(error is not None):
        raise error or OSError("the first process could not write; see its own message.")


def write_once(path: Path, write: Callable[[], Any]) -> None:
    """Calls `write` in the first process if `path` does not exist, after making its folder. Every process must call.

    Raises:
      OSError: As for `on_first_process`.
    """
    if any_process(not path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        on_first_process(write)


def check_mode(mode: str) -> None:
    """Checks a mode of `data_parallel`.

    Raises:
      ValueError: `mode` is neither 'shard_map' nor 'pmap'.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; use 'shard_map' or 'pmap'.")


def data_parallel(step: Step, *, mode: str = "shard_map") -> Step:
    """Maps a step over all devices of all processes.

    The step must average the gradients, the metrics and the batch statistics in the state with `OVER_DEVICES.mean`, so
    that both outputs are the same on every device. Both modes give the same numbers.

    Args:
      step: Function `(state, constants, batches) -> (state, metrics)` for one device: `batches` is the device's share
        of each batch, (chunk, batch / devices, ...).
      mode: 'shard_map' (under jit) or 'pmap'.

    Returns:
      The same function of a replicated state and constants (see `replicate`) and batches split along axis 1 (see
      `shard_batches`); its outputs are replicated. It reuses the memory of the given state, which can then no longer be
      used.

    Raises:
      ValueError: `mode` is unknown.
    """
    check_mode(mode)
    if mode == "pmap":
        return _pmapped(step)
    # With check_vma=True the gradient of a replicated value is already summed over the devices, and a pmean of it
    # would be n_devices times too large.
    mapped = jax.shard_map(
        step, mesh=mesh(), in_specs=(_REPLICATED, _REPLICATED, _SPLIT), out_specs=_REPLICATED, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0)


def _pmapped(step: Step) -> Step:
    """`data_parallel` by `jax.pmap`, which needs this process's part of the batch with an axis for its devices."""
    devices = jax.local_device_count()
    mapped = jax.pmap(step, AXIS, in_axes=(None, None, 1), out_axes=None, donate_argnums=0)

    @jax.jit
    def split(batches: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(x.shape[0], devices, x.shape[1] // devices, *x.shape[2:]), batches)

    def call(state: Any, constants: Any, batches: Any) -> tuple[Any, Any]:
        local = multihost_utils.global_array_to_host_local_array(batches, mesh(), _SPLIT)
        return mapped(state, constants, split(local))

    return call
