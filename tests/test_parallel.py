import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddnp_jax import parallel

ROOT = Path(__file__).parents[1]


def make_problem(batch=16, chunk=3, features=5):
    """Weights, learning rate and (chunk, batch, ...) batches of a least-squares problem."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal(features, dtype=np.float32), "b": np.float32(0.5)}
    x = rng.standard_normal((chunk, batch, features), dtype=np.float32)
    return weights, np.float32(0.1), (x, rng.standard_normal((chunk, batch), dtype=np.float32))


def sgd(state, rate, batches):
    """A chunk of gradient descent as one device computes it."""

    def update(weights, batch):
        x, y = batch
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2))(weights)
        loss, grads = parallel.OVER_DEVICES.mean((loss, grads))
        return jax.tree.map(lambda p, g: p - rate * g, weights, grads), loss

    return jax.lax.scan(update, state, batches)


def run(mode, calls=2, **options):
    weights, rate, batches = make_problem()
    step = parallel.data_parallel(sgd, mode=mode, **options)
    state, rate, batches = parallel.replicate(weights), parallel.replicate(rate), parallel.shard_batches(batches)
    with jax.transfer_guard("disallow"):
        for _ in range(calls):
            state, losses = step(state, rate, batches)
    return parallel.fetch((state, losses))


def numpy_sgd(calls=2):
    """The same descent on whole batches, its gradient written by hand, in float64."""
    weights, rate, (xs, ys) = make_problem()
    w, b = weights["w"].astype(np.float64), float(weights["b"])
    for _ in range(calls):
        losses = []
        for x, y in zip(xs, ys, strict=True):
            error = x @ w + b - y
            losses.append(np.mean(error**2))
            w, b = w - rate * 2 * x.T @ error / len(y), b - rate * 2 * np.mean(error)
    return {"w": w, "b": b}, np.array(losses)


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_eight_devices_take_the_step_of_one_on_the_whole_batch(mode):
    (state, losses), (expected_state, expected_losses) = run(mode), numpy_sgd()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(state["w"], expected_state["w"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state["b"], expected_state["b"], rtol=1e-4, atol=1e-6)


def test_both_modes_give_the_same_bits():
    for one, other in zip(jax.tree.leaves(run("shard_map")), jax.tree.leaves(run("pmap")), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_gradients_are_not_n_devices_times_too_large(mode):
    # loss = mean(x w) has the gradient mean(x) = (0 + 1 + ... + 7) / 8 = 3.5, whatever the number of devices.
    def step(w, rate, batches):
        grad = jax.grad(lambda w: jnp.mean(batches * w))(w)
        return w - rate * parallel.OVER_DEVICES.mean(grad), grad * 0

    batches = parallel.shard_batches(np.arange(8, dtype=np.float32)[None])
    w, _ = parallel.data_parallel(step, mode=mode)(
        parallel.replicate(jnp.float32(10)), parallel.replicate(1.0), batches
    )
    assert w == 6.5


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_each_device_sees_its_share_in_order_and_outputs_are_replicated(mode):
    def step(state, constants, batches):
        return state + parallel.OVER_DEVICES.number(), jax.lax.all_gather(batches[0], parallel.AXIS)

    batches = np.arange(3 * 16 * 2).reshape(3, 16, 2)
    _, gathered = parallel.data_parallel(step, mode=mode)(
        parallel.replicate(0), parallel.replicate(0), parallel.shard_batches(batches)
    )
    np.testing.assert_array_equal(gathered, batches[0].reshape(8, 2, 2))
    assert gathered.sharding.is_fully_replicated and len(gathered.sharding.device_set) == 8


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_steps_with_the_same_shapes_are_traced_once(mode):
    traces = []

    def step(state, constants, batches):
        traces.append(1)
        return sgd(state, constants, batches)

    weights, rate, batches = make_problem()
    mapped = parallel.data_parallel(step, mode=mode)
    state, rate = parallel.replicate(weights), parallel.replicate(rate)
    for _ in range(3):
        state, _ = mapped(state, rate, parallel.shard_batches(batches))
    assert len(traces) == 1


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_donation_takes_the_state_and_nothing_else(mode):
    weights, rate, batches = jax.tree.map(jnp.array, make_problem())
    before = parallel.fetch(weights)
    state, rate, batches = parallel.replicate(weights), parallel.replicate(rate), parallel.shard_batches(batches)
    parallel.data_parallel(sgd, mode=mode)(state, rate, batches)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves((weights, rate, batches)))
    jax.tree.map(np.testing.assert_array_equal, before, parallel.fetch(weights))


def test_fetched_arrays_outlive_a_donated_step():
    weights, rate, batches = make_problem()
    state = parallel.replicate(weights)
    fetched = parallel.fetch(state)
    parallel.data_parallel(sgd)(state, parallel.replicate(rate), parallel.shard_batches(batches))
    jax.tree.map(np.testing.assert_array_equal, fetched, weights)


def test_copies_do_not_follow_their_source():
    source = np.ones(2**16, np.float32)
    on_devices, on_host = parallel.replicate(source), parallel.fetch(source)
    source[:] = 2
    assert on_devices.sum() == on_host.sum() == 2**16


def test_a_batch_that_the_devices_cannot_share_is_refused():
    parallel.check_batch(16, "config.batch_size")
    message = r"config\.batch_size=100 cannot be shared equally by 8 devices; use 96, say\."
    with pytest.raises(ValueError, match=message):
        parallel.check_batch(100, "config.batch_size")
    with pytest.raises(ValueError, match="batch_size=0 cannot be shared equally by 8 devices; use 8"):
        parallel.check_batch(0, "config.batch_size")


def test_wrong_settings_end_in_a_sentence():
    with pytest.raises(ValueError, match="mode='pjit' is unknown; use 'shard_map' or 'pmap'"):
        parallel.data_parallel(sgd, mode="pjit")
    with pytest.raises(ValueError, match="num_processes and process_id missing: set all of"):
        parallel.initialize(True, "127.0.0.1:1234")
    for address in ("first", "first:", ":1234", "first:65536"):
        with pytest.raises(
            ValueError, match=rf"^coordinator_address='{address}' must be the host:port of process 0\.$"
        ):
            parallel.initialize(True, address, 2, 0)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^the first process cannot listen on port {port} \(.*\); give another "):
            parallel.initialize(True, f"127.0.0.1:{port}", 2, 0)
    with pytest.raises(ValueError, match="process_id is set but distributed is False"):
        parallel.initialize(False, process_id=0)
    parallel.initialize(False)  # the one-machine run touches nothing
    assert jax.process_count() == 1


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(num_processes, process_id, port, folder):
    flags = f"--xla_force_host_platform_device_count={2 // num_processes}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.two_processes", str(port), str(num_processes), str(process_id), str(folder)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_with_a_device_each_equal_one_with_two(tmp_path):
    port = free_port()
    processes = [start(n, i, port, tmp_path) for n, i in ((1, 0), (2, 0), (2, 1))]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=3600)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    one, first, second = (np.load(tmp_path / f"{name}.npz") for name in ("1-0", "2-0", "2-1"))
    assert len(one.files) == 12
    for name in one.files:  # bit for bit
        np.testing.assert_array_equal(first[name], one[name], err_msg=name)
        np.testing.assert_array_equal(second[name], one[name], err_msg=name)
    assert first["asked by the last"] and not first["asked by none"]
    assert first["written by"] == 0 and first["failed everywhere"]
    assert first["restored step"] == 1  # step 2 was damaged by process 0: both fell back
    assert (tmp_path / "2" / "2.damaged").exists()
