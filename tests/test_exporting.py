"""`config.export`: the files that a run writes for other runtimes, their measurements, and a repeated export."""

import hashlib
import json

import jax
import jax.export
import numpy as np
import pytest

from ddnp_jax import data, pipeline
from ddnp_jax.config import typed
from ddnp_jax.cost import multiples, timing
from ddnp_jax.networks import as_network
from ddnp_jax.pipeline import exporting, report
from ddnp_jax.pipeline.results import Results
from ddnp_jax.saved import load_pruned
from tests.small_job import Own, tiny

FILES = ("network.onnx", "network_int8.onnx", "network.stablehlo", "network.stablehlo.json")


def run(config, workdir):
    return pipeline.run(config, workdir, model=Own((20, 12)), rebuild=Own)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny(str(tmp_path_factory.mktemp("tfds")))
    config.search.method = "magnitude"
    config.budget.p = 0.6
    return config


@pytest.fixture(scope="module")
def exported(config, tmp_path_factory):
    """A run that was exported after it had ended: (workdir, report)."""
    pytest.importorskip("jax2onnx")
    workdir = tmp_path_factory.mktemp("run")
    plain = run(config, workdir)
    assert plain["exports"] == {} and not (workdir / "export").exists()
    config.export = "onnx, onnx_int8,stablehlo"
    found = run(config, workdir)
    assert found["latency_ms"] == plain["latency_ms"]  # not measured again
    return workdir, found


def computed(path):
    """The file as a function of pixels, without this library."""
    if path.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path)
        return lambda pixels: session.run(None, {session.get_inputs()[0].name: pixels})[0]
    return jax.export.deserialize(bytearray(path.read_bytes())).call


def test_files_take_pixels_and_have_the_accuracy_of_the_report(config, exported):
    workdir, found = exported
    test = data.load(typed(config).data).test
    pixels = test.images.astype(np.float32)
    top1 = {
        name: 100 * np.mean(np.argmax(computed(workdir / "export" / name)(pixels), -1) == test.labels)
        for name in FILES[:3]
    }
    assert top1["network.onnx"] == top1["network.stablehlo"] == pytest.approx(found["pruned_top1"])
    assert top1["network_int8.onnx"] == pytest.approx(found["exports"]["onnx_int8"]["top1"])
    assert found["exports"]["onnx"]["top1"] is None
    metadata = json.loads((workdir / "export" / "network.stablehlo.json").read_text())
    assert metadata["normalizes"] is True and metadata["mean"] == [0.3]


def test_the_report_has_files_checks_and_times(exported):
    workdir, found = exported
    assert found == json.loads((workdir / "report.json").read_text())
    assert list(found["exports"]) == ["onnx", "onnx_int8", "stablehlo"]
    files = {path: facts for each in found["exports"].values() for path, facts in each["files"].items()}
    assert [*files] == [f"export/{name}" for name in FILES]
    for path, facts in files.items():
        content = (workdir / path).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for form in ("onnx", "stablehlo"):
        assert found["exports"][form]["max_difference"] < 1e-5
        assert found["exports"][form]["argmax_agreement"] == 1
        assert found["exports"][form]["compared_images"] == 15  # 120 over eight devices
    assert 1e-5 < found["exports"]["onnx_int8"]["max_difference"] < 1
    measured = [(each["runtime"], each["batch"]) for each in found["speedups"]]
    onnx, int8 = "ONNX Runtime (CPU)", "ONNX Runtime (CPU), int8"
    assert measured == [("XLA", 1), ("XLA", 15), (onnx, 1), (onnx, 15), (int8, 1), (int8, 15)]
    assert all(each["before"] > 0 and each["after"] > 0 for each in found["other_latencies"])
    assert report.read(workdir / "report.json").to_json() == found


def test_a_budget_in_onnx_runtime_has_its_times_in_the_report(config, tmp_path, monkeypatch):
    pytest.importorskip("jax2onnx")
    config = config.copy_and_resolve_references()
    config.export = ""
    config.budget.update(multiple=0, runtime="onnx")
    times = multiples.MultipleTimes("abacus", 15, "onnx", {"1": 10.0, "4": 8.0}, (20, 12))
    monkeypatch.setattr(multiples, "measure", lambda timer: times)
    found = run(config, tmp_path)
    assert all(width % 4 == 0 for width in found["widths"])
    measured = [(each["runtime"], each["batch"]) for each in found["speedups"]]
    assert measured == [("XLA", 1), ("XLA", 15), ("ONNX Runtime (CPU)", 1), ("ONNX Runtime (CPU)", 15)]
    assert any("Widths are multiples of 4, the fastest that can meet the budget" in note for note in found["notes"])


def test_a_resumed_run_writes_again_what_is_gone_or_damaged_and_nothing_else(config, exported, monkeypatch):
    workdir, found = exported
    written = []
    write = exporting._write
    monkeypatch.setattr(exporting, "_write", lambda job, form, *rest: written.append(form) or write(job, form, *rest))
    assert run(config, workdir) == found and written == []
    (workdir / "export" / "network.stablehlo.json").unlink()
    (workdir / "export" / "network.onnx").write_bytes(b"damaged")
    again = run(config, workdir)
    assert written == ["onnx", "stablehlo"]
    assert again["exports"]["onnx_int8"] == found["exports"]["onnx_int8"]
    for name in FILES:
        assert (workdir / "export" / name).stat().st_size > 100
    assert len(computed(workdir / "export" / "network.onnx")(np.zeros((3, 16, 16, 1), np.float32))) == 3


def test_another_network_is_exported_anew(config, exported):
    workdir, _ = exported
    job = pipeline.prepare(config, workdir, model=Own((20, 12)), rebuild=Own)
    model, variables = load_pruned(workdir / "pruned", Own(tuple(report.read(workdir / "report.json").widths)))
    changed = jax.tree.map(lambda leaf: np.asarray(2 * leaf), variables)
    pixels = job.dataset.test.images[:5].astype(np.float32)
    small = as_network(model, train=False)
    exporting.write(job, job.network.initial(jax.random.key(0), pixels), small, changed)
    normalized = (pixels / 255 - np.float32(0.3)) / np.float32(0.35)
    wanted = model.apply(changed, normalized, train=False)
    for name in ("network.onnx", "network.stablehlo"):
        np.testing.assert_allclose(computed(workdir / "export" / name)(pixels), wanted, rtol=1e-4, atol=1e-4)


def test_formats_are_refused_before_any_work(config, tmp_path, monkeypatch):
    config = config.copy_and_resolve_references()
    config.export = "onnx,tflite"
    with pytest.raises(ValueError, match=r"^export='onnx,tflite' names 'tflite', which is unknown; join any of 'onnx'"):
        run(config, tmp_path / "run")
    config.export = "stablehlo"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^export='stablehlo' needs flatbuffers; run `pip install ddnp_jax"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_result_is_measured_again_where_it_is_of_something_else_or_holds_no_more(tmp_path):
    results, values = Results(tmp_path / "results.json"), iter("abcdef")

    def measure():
        return next(values)

    assert results.measured("x", "one", measure) == "a"
    assert results.measured("x", "one", measure, lambda value: value == "a") == "a"
    assert results.measured("x", "two", measure, lambda value: True) == "b"
    assert results.measured("x", "two", measure, lambda value: value == "a") == "c"
    assert results.values() == {"x": "c"}


def test_times_are_taken_in_turn_after_a_call_that_compiles(monkeypatch):
    calls, clock = [], iter(range(10**6))
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.__next__() / 1000)
    slow = [5000, 1, 20, 1, 3]  # more milliseconds of the second's calls: the first compiles

    def second():
        for _ in range(slow.pop(0)):
            next(clock)
        calls.append("second")

    found = timing.in_turn([lambda: calls.append("first"), second], seconds=0)
    assert calls == ["first", "second"] * 4
    assert found == pytest.approx([1, 2])  # of 2, 21 and 2


def test_a_network_that_cannot_be_exported_has_its_report(config, tmp_path, monkeypatch):
    config = config.copy_and_resolve_references()
    config.export = "stablehlo"

    def refuse(*args, **kwargs):
        raise ValueError("an operation is unknown")

    monkeypatch.setattr(exporting.export, "stablehlo", refuse)
    with pytest.raises(ValueError, match="an operation is unknown"):
        run(config, tmp_path)
    found = report.read(tmp_path / "report.json")
    assert found.exports == {} and found.pruned_top1 == Results(tmp_path / "results.json").values()["pruned"]["top1"]
