"""A stored selection: it is proposed as it is, refused where it does not fit, and fine-tuned by a run of its own."""

import re

import jax
import numpy as np
import pytest

import ddnp_jax
from ddnp_jax import methods, pipeline
from ddnp_jax.cost.budget import Budget
from ddnp_jax.saved import save_pruned
from ddnp_jax.topology import Selection
from tests.small_job import Own, tiny

SHAPE = (8, 8, 1)
MODEL = Own((20, 12))
TOPOLOGY = ddnp_jax.trace(MODEL, SHAPE)
# By hand: 16 positions of 9 x 1 x 20 and 4 of 9 x 20 x 12, and the 12 x 10 of the classifier.
WHOLE = 16 * 9 * 20 + 4 * 9 * 20 * 12 + 12 * 10


def built(path, p=0.5):
    config = methods.configure("stored", {"selection": str(path)})
    budget = Budget(TOPOLOGY, p)
    return methods.build("stored", methods.Problem(MODEL, None, TOPOLOGY, budget, config, steps=0)), budget


def chosen(path, p=0.5):
    search, budget = built(path, p)
    return methods.select(search, search.init(jax.random.key(0)), budget)


@pytest.mark.parametrize("seed", range(5))
def test_the_stored_channels_are_kept(tmp_path, seed):
    rng = np.random.default_rng(seed)
    widths = [(9, 12), (12, 9), (1, 1), (3, 12), (15, 5)][seed]
    kept = tuple(tuple(sorted(map(int, rng.permutation(n)[:width]))) for n, width in zip((20, 12), widths, strict=True))
    Selection(kept).save(tmp_path / "selection.json")
    assert chosen(tmp_path / "selection.json", p=0.6) == Selection(kept)


def test_the_state_tells_one_file_from_another(tmp_path):
    states = []
    for kept in (((0, 1), (2,)), ((0, 2), (2,))):
        Selection(kept).save(tmp_path / "selection.json")
        states.append(built(tmp_path / "selection.json")[0].init(jax.random.key(0)))
    assert [[int(i) for i in np.flatnonzero(state[0])] for state in states] == [[0, 1], [0, 2]]


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "selection.json"
    with pytest.raises(ValueError, match=r"^selection='' is not a file; give the selection\.json of an earlier run\.$"):
        chosen("")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"^selection='.*selection\.json' does not belong to .*does not hold a sel"):
        chosen(path)
    Selection(((0, 1),)).save(path)
    with pytest.raises(ValueError, match=r"does not belong to this network: the selection has 1 gates, the network 2"):
        chosen(path)
    Selection(((0, 20), (0,))).save(path)
    with pytest.raises(
        ValueError, match=r"does not belong to this network: gate first: kept channels must be in 0\.\."
    ):
        chosen(path)


def test_a_selection_above_the_budget_names_the_smallest_p_that_it_meets(tmp_path):
    path = tmp_path / "selection.json"
    Selection.first((10, 12)).save(path)
    half = 16 * 9 * 10 + 4 * 9 * 10 * 12 + 12 * 10
    least = np.ceil(1e4 * half / WHOLE) / 1e4
    with pytest.raises(
        ValueError, match=re.escape(f"more than the {0.4 * WHOLE:,.0f} of p=0.4; use p of at least {least:.4f}.")
    ):
        chosen(path, p=0.4)
    assert chosen(path, p=least).widths == (10, 12)


def test_a_run_fine_tunes_what_another_run_selected(tmp_path):
    variables = MODEL.init(jax.random.key(0), np.zeros((1, *SHAPE)), train=False)
    save_pruned(tmp_path / "base", MODEL, variables)

    def run(workdir, argument, **fields):
        config = tiny(str(tmp_path / "tfds"), argument)
        config.base.weights = str(tmp_path / "base")
        config.finetune.epochs = 0
        config.update_from_flattened_dict(fields)
        return pipeline.run(config, tmp_path / workdir, model=MODEL, rebuild=Own)

    first = run("first", "magnitude")
    path = tmp_path / "first" / "selection.json"
    second = run("second", "stored", **{"search.selection": str(path), "finetune.epochs": 1})
    assert Selection.load(tmp_path / "second" / "selection.json") == Selection.load(path)
    assert second["unfinetuned_top1"] == first["unfinetuned_top1"]
    assert second["method"] == "stored"
    assert list(second["training"]) == ["finetune"]
    assert any(str(path) in note for note in second["notes"])
    with pytest.raises(ValueError, match=r"^search\.selection='nowhere' is not a file"):
        run("third", "stored", **{"search.selection": "nowhere"})
    assert not (tmp_path / "third").exists()

    path = path.rename(tmp_path / "moved.json")
    fields = {"search.selection": str(path), "finetune.epochs": 1}
    assert run("second", "stored", **fields)["pruned_top1"] == second["pruned_top1"]
    Selection.first((1, 1)).save(path)
    before = (tmp_path / "second" / "selection.json").read_bytes()
    with pytest.raises(ValueError, match=r"given\.selection: workdir has '[0-9a-f]{64}', this run has '[0-9a-f]{64}'"):
        run("second", "stored", **fields)
    assert (tmp_path / "second" / "selection.json").read_bytes() == before
