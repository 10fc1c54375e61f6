"""The latency table: interpolation of known values, its file, and which layers are timed; never a measured time."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from ddnp_jax import cpu
from ddnp_jax.compact import compact
from ddnp_jax.cost import latency, network_times
from ddnp_jax.cost.latency import LatencyTable, LayerTimes
from ddnp_jax.cost.layer_calls import layer_calls
from ddnp_jax.cost.network_times import NetworkTimer
from ddnp_jax.topology import Selection, jaxprs, trace

SHAPE = (16, 16, 3)


@functools.cache
def topology():
    return trace(zoo.MobileNet(), SHAPE)


def synthetic(network, seed=0, points=3):
    """A table with random times at random widths."""
    rng = np.random.default_rng(seed)

    def grid(extent):
        if not extent.gates:
            return ()
        channels = extent.at(network.widths)
        return (
            *sorted(map(int, rng.choice(np.arange(1, channels), min(points, channels) - 1, replace=False))),
            channels,
        )

    layers = []
    for layer in network.layers:
        inputs, outputs = grid(layer.inputs), grid(layer.outputs)
        ms = rng.uniform(0.1, 9, (len(inputs) or 1, len(outputs) or 1))
        layers.append(
            LayerTimes(layer.name, layer.kernel_shape, layer.positions, inputs, outputs, tuple(map(tuple, ms.tolist())))
        )
    return LatencyTable("abacus", 8, tuple(layers))


def counted(table, network, widths):
    """The same sum with numpy's one-dimensional interpolation, first over outputs, then over inputs."""
    total = 0.0
    for times, layer in zip(table.layers, network.layers, strict=True):
        rows = [
            np.interp(layer.outputs.at(widths) if layer.outputs.gates else 1, times.outputs or (1,), row)
            for row in times.ms
        ]
        total += np.interp(layer.inputs.at(widths) if layer.inputs.gates else 1, times.inputs or (1,), rows)
    return total


TABLE = synthetic(topology())
traced = jax.jit(jax.value_and_grad(functools.partial(TABLE.ms, topology())))


@settings(max_examples=60, deadline=None)
@given(st.tuples(*(st.integers(1, channels) for channels in topology().widths)), st.floats(0, 0.99))
def test_interpolation_is_numpys(widths, fraction):
    assert TABLE.ms(topology(), widths) == pytest.approx(counted(TABLE, topology(), widths), rel=1e-12)
    between = [max(width - fraction, 0.5) for width in widths]  # below the first measured width its time stays
    value, slope = traced(jnp.array(between, jnp.float32))
    assert float(value) == pytest.approx(counted(TABLE, topology(), between), rel=1e-5)
    assert np.isfinite(slope).all()


def test_slope_is_that_of_the_segment_and_at_a_point_that_of_smaller_widths():
    rng = np.random.default_rng(1)
    for _ in range(10):
        widths = [float(rng.integers(2, channels + 1)) for channels in topology().widths]
        _, slope = traced(jnp.array(widths, jnp.float32))
        for i in range(len(widths)):
            less = [w - 0.25 * (j == i) for j, w in enumerate(widths)]
            step = (counted(TABLE, topology(), widths) - counted(TABLE, topology(), less)) / 0.25
            assert float(slope[i]) == pytest.approx(step, rel=1e-3, abs=1e-3)


def test_at_measured_widths_the_table_is_its_measurements():
    whole = sum(times.ms[-1][-1] for times in TABLE.layers)
    assert TABLE.ms(topology()) == pytest.approx(whole, rel=1e-12)


def test_a_layer_with_both_gates_literal():
    network = trace(zoo.VGG(features=(4, 8, 3, 5)), SHAPE)
    table = synthetic(network)
    between = next(
        i for i, layer in enumerate(network.layers) if (layer.inputs.gates, layer.outputs.gates) == ((0,), (1,))
    )
    free = [dataclasses.replace(t, ms=tuple((1e-9,) * len(row) for row in t.ms)) for t in table.layers]
    free[between] = dataclasses.replace(free[between], inputs=(2, 4), outputs=(4, 8), ms=((1.0, 3.0), (2.0, 8.0)))
    table = dataclasses.replace(table, layers=tuple(free))
    for widths, expected in {(2, 4): 1, (2, 8): 3, (4, 4): 2, (4, 8): 8, (3, 6): 3.5, (3, 5): 2.5, (1, 2): 1}.items():
        assert table.ms(network, (*widths, 3, 5)) == pytest.approx(expected, abs=1e-7)


# The file


def test_the_file_gives_back_the_same_numbers(tmp_path):
    TABLE.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json", topology()) == TABLE


def damage(content, path, value):
    *where, last = path
    functools.reduce(lambda inner, key: inner[key], where, content)[last] = value


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (
            ("layers", 0, "name"),
            "trunk",
            "it has trunk with kernel (3, 3, 3, 8) at 64 positions where the network has stem",
        ),
        (("layers", 0, "kernel_shape"), [1, 1, 3, 8], "it has stem with kernel (1, 1, 3, 8) at 64"),
        (("layers", 0, "positions"), 65, "with kernel (3, 3, 3, 8) at 65 positions where"),
        (("layers", 1, "outputs"), [], "block1/expand: outputs [] must be ascending numbers up to 12 channels"),
        (("layers", 1, "outputs"), [1, 4, 11], "block1/expand: outputs [1, 4, 11] must be ascending numbers up to 12"),
        (("layers", 1, "outputs"), [4, 4, 12], "outputs [4, 4, 12] must be ascending"),
        (("layers", 1, "inputs"), [8], "block1/expand: inputs [8] must be ascending numbers up to None"),
        (("layers", 1, "ms"), [[1.0, 2.0]], "block1/expand: ms must be 1 rows of 3, one per width"),
        (("layers", 1, "ms"), [[1.0, 2.0, 0.0]], "every time must be a positive number"),
        (("layers", 1, "ms"), [[1.0, 2.0, float("nan")]], "every time must be a positive number"),
        (("layers",), [], "it has 0 layers, the network "),
        (("layers", 1), {}, "layers[1].name is missing"),
        (("layers", 1, "positions"), "many", "layers[1].positions='many' must be a whole number"),
        (("layers", 1, "ms"), [["fast"]], "layers[1].ms=[['fast']] must be numbers"),
        (("batch",), None, "batch=None must be a whole number"),
        (("layers",), 3, "layers must be a list"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_one_sentence(tmp_path, path, value, reason):
    file = tmp_path / "latency.json"
    TABLE.save(file)
    content = json.loads(file.read_text())
    damage(content, path, value)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        LatencyTable.load(file, topology())
    assert str(error.value).startswith(f"{file} is not a latency table of this network (")
    assert reason in str(error.value)
    assert str(error.value).endswith("; delete it, and it is measured again.")


def test_a_damaged_file_is_refused(tmp_path):
    file = tmp_path / "latency.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="is not a latency table of this network"):
        LatencyTable.load(file, topology())


# Measuring


@pytest.fixture
def timed(monkeypatch):
    """Every call that is to be timed, in order; takes as long as its input and output are wide."""
    calls = []

    def pretend(call, runtime):
        calls.append(call)
        return float(call.x[call.read_axis] * 1000 + call.kernel[call.axes[1]])

    monkeypatch.setattr(latency, "_milliseconds", pretend)
    monkeypatch.setattr(latency, "_networks", lambda *_: ())
    return calls


@pytest.mark.parametrize(
    "model",
    [zoo.MobileNet(), zoo.VGG(), zoo.Multiplier(), zoo.PreActResNet(), zoo.OwnKernels(), zoo.Middle(zoo.grouped)],
    ids=lambda m: type(m).__name__,
)
def test_every_layer_is_timed_as_the_smaller_network_calls_it(model, timed):
    """At all gates' smallest widths, the timed layers are the layers of the program of the cut network."""
    network = trace(model, SHAPE)
    table = latency.measure(NetworkTimer(model, network, 4), points=3)
    for times, layer in zip(table.layers, network.layers, strict=True):
        for grid, extent in ((times.inputs, layer.inputs), (times.outputs, layer.outputs)):
            assert (grid == ()) == (extent.gates == ())
            if grid:
                smallest = extent.at([1] * len(network.gates))
                assert (grid[0], grid[-1]) == (smallest, extent.at(network.widths))
    whole = {(call.primitive, call.x, call.kernel, call.groups) for call in timed}
    for call in layer_calls(model, network, 4, None):
        assert (call.primitive, call.x, call.kernel, call.groups) in whole
        shapes = [jax.ShapeDtypeStruct(shape, call.dtype) for shape in (call.x, call.kernel)]
        assert jax.eval_shape(call.__call__, *shapes).shape[0] == 4
    timed.clear()
    if network.gates and not isinstance(model, zoo.OwnKernels):
        small, variables = compact(
            model, zoo.randomized(model, SHAPE), Selection.first([1] * len(network.gates)), network
        )
        program = jax.make_jaxpr(lambda v, x: small.apply(v, x))(variables, jnp.ones((4, *SHAPE))).jaxpr
        smallest = {tuple(v.aval.shape for v in eqn.invars) for eqn in jaxprs.contractions(program)}
        kernels = {(call[1], call[2]) for call in whole}
        for x, kernel in smallest:
            assert (x, kernel) in kernels


def test_geometry_of_a_layer_and_its_place_in_the_table(timed):
    network = topology()
    table = latency.measure(NetworkTimer(zoo.MobileNet(), network, 4), points=3)
    names = [layer.name for layer in network.layers]
    expand, depthwise, project = (
        table.layers[names.index(f"block2/{name}")] for name in ("expand", "depthwise", "project")
    )
    assert (expand.inputs, expand.outputs, expand.ms) == ((), (1, 8, 16), ((8001.0, 8008.0, 8016.0),))
    assert (depthwise.inputs, depthwise.outputs, depthwise.ms) == ((), (1, 8, 16), ((1001.0, 8008.0, 16016.0),))
    assert (project.inputs, project.outputs) == ((1, 8, 16), (1, 6, 10))
    assert project.ms == ((1001.0, 1006.0, 1010.0), (8001.0, 8006.0, 8010.0), (16001.0, 16006.0, 16010.0))
    call = next(call for call in timed if call.groups == 8)
    assert (dict(call.arguments)["window_strides"], call.x, call.kernel) == ((2, 2), (4, 8, 8, 8), (3, 3, 1, 8))


def test_the_same_layer_is_timed_once(timed):
    model = zoo.Middle(lambda x: x.mean((1, 2)))
    network = trace(model, SHAPE)
    latency.measure(NetworkTimer(model, network, 4), points=2)
    assert len(timed) == 4  # two widths of the convolution, two of the classifier
    timed.clear()
    latency.measure(NetworkTimer(zoo.Twice(), trace(zoo.Twice(), SHAPE), 4), points=2)
    assert len(timed) == 2 + 4 + 2  # the layer that is used twice once, at both widths of either side


def test_a_layer_is_computed_as_in_the_network():
    x, kernel = jnp.ones((4, 8, 8, 16)), jnp.ones((3, 3, 1, 16))
    network = topology()
    names = [layer.name for layer in network.layers]
    call = layer_calls(zoo.MobileNet(), network, 4, None)[names.index("block2/depthwise")]
    expected = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=16
    )
    np.testing.assert_array_equal(call(x, kernel), expected)
    np.testing.assert_array_equal(call.resized(None, 5)(x[..., :5], kernel[..., :5]), expected[..., :5])


@pytest.mark.parametrize(
    ("arguments", "widths"),
    [
        ((16, 5, 1), (1, 5, 8, 12, 16)),
        ((64, 3, 8), (8, 32, 64)),
        ((20, 3, 8), (8, 16, 20)),
        ((4, 5, 8), (4,)),
        ((3, 5, 1), (1, 2, 3)),
    ],
)
def test_measured_widths_are_multiples_and_the_whole(arguments, widths):
    channels, points, multiple = arguments
    network = trace(zoo.Middle(lambda x: x.mean((1, 2)), channels), SHAPE)
    extent = network.layers[0].outputs
    assert latency._knots(extent, network, points, multiple) == widths


@pytest.mark.parametrize("runtime", ["xla", "onnx"])
def test_a_table_is_measured_once_and_then_read(runtime, tmp_path, monkeypatch):
    if runtime == "onnx":
        pytest.importorskip("jax2onnx")
        pytest.importorskip("onnxruntime")
    model = zoo.Middle(lambda x: x.mean((1, 2)))
    network = trace(model, SHAPE)
    path = tmp_path / "run" / "latency.json"
    timer = NetworkTimer(model, network, 4, runtime)
    table = latency.measured_once(path, timer, 2, 1)
    assert all(0 < ms < np.inf for times in table.layers for row in times.ms for ms in row)
    device = f"ONNX Runtime, {cpu.description()}" if runtime == "onnx" else cpu.description()
    assert (table.device, table.batch, table.runtime) == (device, 4, runtime)
    assert [each.widths for each in table.networks] == [(8,), (6,), (4,), (2,), (1,)]
    monkeypatch.setattr(latency, "_milliseconds", lambda *_: pytest.fail("measured again"))
    assert latency.measured_once(path, timer, 2, 1) == table
    with pytest.raises(ValueError, match=rf"was measured with 4 images per call in {runtime}, this run has 8 in xla"):
        latency.measured_once(path, NetworkTimer(model, network, 8), 2, 1)
    for points, multiple in ((3, 1), (2, 4)):
        with pytest.raises(ValueError, match=rf"other widths than {points} per gate in multiples of {multiple}; del"):
            latency.measured_once(path, timer, points, multiple)
    dataclasses.replace(table, device="abacus").save(path)  # another device's table may have any widths
    assert latency.measured_once(path, timer, 3, 1).device == "abacus"


# The whole network


def with_networks(milliseconds):
    """The table with times of the network that are a function of the sum over the layers."""
    every = [topology().widths, *(tuple(max(c // n, 1) for c in topology().widths) for n in (2, 4))]
    networks = [latency.NetworkTime(widths, milliseconds(counted(TABLE, topology(), widths))) for widths in every]
    return dataclasses.replace(TABLE, networks=tuple(networks))


def test_a_network_takes_an_overhead_and_a_factor_of_its_layers():
    table = with_networks(lambda layers: 7.0 + 1.5 * layers)
    widths = [max(channels - 1, 1) for channels in topology().widths]
    layers = counted(TABLE, topology(), widths)
    assert table.layers_ms(topology(), widths) == pytest.approx(layers, rel=1e-12)
    assert table.ms(topology(), widths) == pytest.approx(7.0 + 1.5 * layers, rel=1e-9)
    slope, own = (jax.grad(functools.partial(t.ms, topology()))(jnp.array(widths, jnp.float32)) for t in (table, TABLE))
    np.testing.assert_allclose(slope, 1.5 * own, rtol=1e-4, atol=1e-5)


def test_neither_overhead_nor_factor_is_negative():
    widths = topology().widths
    faster = with_networks(lambda layers: 2 * layers - 1.0)  # less than in proportion: no overhead
    half = [max(c // 2, 1) for c in widths]
    ratio = faster.ms(topology()) / faster.ms(topology(), half)
    assert ratio == pytest.approx(counted(TABLE, topology(), widths) / counted(TABLE, topology(), half), rel=1e-9)
    slower = with_networks(lambda layers: 1000.0 - layers)  # narrower ones take longer: the widths say nothing
    assert slower.ms(topology()) == slower.ms(topology(), half) > 0


def test_times_of_networks_are_checked(tmp_path):
    file = tmp_path / "latency.json"
    table = with_networks(lambda layers: layers)
    table.save(file)
    assert LatencyTable.load(file, topology()) == table
    for path, value, reason in (
        (("networks",), None, "networks must be a list"),
        (("networks", 0, "ms"), 0.0, "networks: ms=0.0 must be a positive number of milliseconds"),
        (("networks", 1, "widths"), [1], "networks: widths [1] must be one number of channels for each gate"),
    ):
        content = dataclasses.asdict(table)
        content["networks"] = list(content["networks"])
        damage(content, path, value)
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError) as error:
            LatencyTable.load(file, topology())
        assert reason in str(error.value)


def test_a_depthwise_layer_in_onnx_runtime():
    """This library's depthwise convolution has a form for each platform, of which ONNX has none."""
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    network = topology()
    names = [layer.name for layer in network.layers]
    call = layer_calls(zoo.MobileNet(), network, 4, None)[names.index("block2/depthwise")]
    x, kernel = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in (call.x, call.kernel))
    [found] = network_times.compiled("onnx", lambda kernel, x: call(x, kernel), kernel, jnp.asarray(x))()
    np.testing.assert_allclose(found, call(x, kernel), rtol=1e-5, atol=1e-5)


def test_threads_of_onnx_runtime_stop_after_each_run(monkeypatch):
    """Threads that keep spinning would take the cores from the network that is timed next."""
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    opened, session = [], onnxruntime.InferenceSession

    def open_session(content, options, **arguments):
        opened.append(options)
        return session(content, options, **arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    [found] = network_times.compiled("onnx", lambda factor, x: factor * x, np.float32(2), jnp.ones((1, 3)))()
    np.testing.assert_array_equal(found, [[2, 2, 2]])
    assert [options.get_session_config_entry("session.force_spinning_stop") for options in opened] == ["1"]
