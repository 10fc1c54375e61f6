"""The typed configuration: invalid values, its command line form, and the identity of a run."""

import dataclasses
import json
import re

import numpy as np
import pytest

from configs import cifar10_r56, default, digits_r20
from ddnp_jax import data, methods
from ddnp_jax.config import (
    BaseConfig,
    BudgetConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    SearchConfig,
    as_dict,
    check,
    typed,
)
from ddnp_jax.fields import listed, names


def refused(config, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check(typed(config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(base=BaseConfig(learning_rate=-1.0)), "base.learning_rate=-1.0 must be at least 0.0."),
        (Config(base=BaseConfig(learning_rate=float("inf"))), "base.learning_rate=inf must be finite."),
        (Config(base=BaseConfig(decay_at=(0.5, 2))), "base.decay_at=(0.5, 2.0) must be in (0, 1] in every entry: frac"),
        (Config(base=BaseConfig(micro_batches=0)), "base.micro_batches=0 must be at least 1."),
        (
            Config(budget=BudgetConfig(kind="latency", p=2)),
            "budget.p=2.0 must be in (0, 1]: the fraction of the cost that remains.",
        ),
        (Config(budget=BudgetConfig(multiple=-1)), "budget.multiple=-1 must be at least 0."),
        (Config(budget=BudgetConfig(latency_points=1)), "budget.latency_points=1 must be at least 2."),
        (
            Config(budget=BudgetConfig(kind="macs")),
            "budget.kind='macs' is unknown; use one of 'flops', 'params', 'latency'.",
        ),
        (
            Config(budget=BudgetConfig(kind="params", convention="flops")),
            "budget.convention='flops' is unknown; use one of 'macs', 'authors'.",
        ),
        (Config(precision="float16"), "precision='float16' is unknown; use one of 'float32', 'bfloat16'."),
        (Config(seed=99999999999999999999), "seed=99999999999999999999 must be below 2**63."),
        (Config(data=DataConfig(mean=(float("nan"),))), "data.mean=(nan,) must be finite."),
        (
            Config(export="onnx,,onxx"),
            "export='onnx,,onxx' names 'onxx', which is unknown; join any of 'onnx', 'onnx_in",
        ),
        (Config(search=SearchConfig(method="ddpn")), "search.method='ddpn' is unknown; use one of 'ddnp', 'nppm', "),
    ],
)
def test_values_beyond_the_limits_are_refused(config, message):
    refused(config, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(seed="a"), "seed='a' must be a whole number."),
        (Config(seed=True), "seed=True must be a whole number."),
        (Config(finetune=FinetuneConfig(epochs=1.5)), "finetune.epochs=1.5 must be a whole number."),
        (Config(base=BaseConfig(weights=None)), "base.weights=None must be a text."),
        (Config(base=BaseConfig(augment=1)), "base.augment=1 must be True or False."),
        (Config(base=BaseConfig(momentum="0.9")), "base.momentum='0.9' must be a number."),
        (Config(data=DataConfig(mean=0.5)), "data.mean=0.5 must be numbers."),
        (Config(notes="a sentence"), "notes='a sentence' must be texts."),
        (Config(model=ModelConfig(attributes="avgpool")), "model.attributes='avgpool' must be values by name."),
        (Config(data="cifar10"), "data='cifar10' must be a section, with the fields name, label, data_dir,"),
        (Config(search=SearchConfig(fields={"tie_weight": "1"})), "search.tie_weight='1' must be a number."),
        (
            Config(search=SearchConfig(fields={"width_optimizer": {"learning_rate": None}})),
            "search.width_optimizer.learning_rate=None must be a number.",
        ),
        (
            Config(search=SearchConfig(fields={"importance": "none"})),
            "search.importance='none' is unknown; use one of 'generator', 'scalar', 'l1'.",
        ),
        (
            Config(search=SearchConfig(fields={"tie_wieght": 1.0})),
            "search.tie_wieght is not a field of the method 'ddnp'; its fields are resource_loss, resource_weight, ",
        ),
        ({"serach": {}}, "serach is not a field of the configuration; did you mean 'search'?"),
        ({"xyz": {}}, "xyz is not a field of the configuration; there are seed, variant, precision,"),
        ({"base": {"epoch": 3}}, "base.epoch is not a field of the configuration; did you mean 'epochs'?"),
    ],
)
def test_wrong_types_and_names_are_refused(config, message):
    refused(config, message)


def test_a_field_of_the_search_is_looked_for_among_common_ones_and_those_of_the_method():
    with pytest.raises(ValueError, match=r"^search\.epoch is not a field of 'ddnp'; did you mean 'epochs'\?$"):
        SearchConfig.of("ddnp", epoch=5)
    with pytest.raises(ValueError, match=r"^search\.tie_wieght is not a field of 'ddnp'; did you mean 'tie_weight'\?$"):
        SearchConfig.of("ddnp", tie_wieght=5)


def test_a_configuration_of_the_command_line_may_change_its_method_where_the_fields_are_there():
    config = digits_r20.get_config()
    config.search.method = "magnitude"
    config.search.allocation = "global"
    assert typed(config).search.method_fields().allocation == "global"
    assert typed(config).search.epochs == 1  # a score reads every image once
    config.search.method = "nppm"
    refused(config, "search.method='nppm' needs search.optimizer, which this configuration lacks; choose")


def test_formats_are_joined_by_commas():
    check(Config(export="stablehlo, onnx"))
    assert listed(" stablehlo, onnx,,onnx") == ("stablehlo", "onnx")
    assert listed("") == ()


def test_values_become_plain_ones_of_their_types():
    config = typed(Config(seed=np.int64(3), budget=BudgetConfig(p=1), data=DataConfig(mean=np.ones(3, np.float32))))
    assert (config.seed, config.budget.p, config.data.mean) == (3, 1.0, (1.0, 1.0, 1.0))
    assert [type(value) for value in (config.seed, config.budget.p)] == [int, float]
    assert json.loads(json.dumps(as_dict(config)))["data"]["mean"] == [1.0, 1.0, 1.0]


def test_a_configuration_is_the_same_in_all_of_its_forms():
    for argument in default.SEARCHES:
        config = cifar10_r56.get_config(argument)
        assert as_dict(typed(config)) == config.to_dict()
        assert typed(typed(config)) == typed(config) == typed(config.to_dict())
    model = ModelConfig(attributes={"shortcut": "avgpool"})
    own = Config(model=model, budget=BudgetConfig(p=0.48))
    assert as_dict(typed(own)) == cifar10_r56.get_config().to_dict()


def test_a_search_has_the_defaults_of_its_method():
    search = SearchConfig.of("nppm", predictor="none", epochs=7, optimizer={"learning_rate": 0.1})
    assert (search.method, search.epochs, search.augment) == ("nppm", 7, True)
    fields = typed(Config(search=search)).search.method_fields()
    assert (fields.predictor, fields.resource_loss) == ("none", "log_max")
    assert fields.optimizer == methods.AdamW(learning_rate=0.1, weight_decay=1e-2)
    with pytest.raises(ValueError, match=r"^search\.tie_weight is not a field"):
        SearchConfig.of("nppm", tie_weight=0.5)


def test_no_method_has_a_field_of_the_name_of_a_common_one():
    for method in methods.METHODS:
        assert not {*methods.default_fields(method)} & {*names(SearchConfig)}


def test_the_normalization_is_that_of_the_named_data_set():
    assert data.complete(DataConfig()).mean == (0.4914, 0.4822, 0.4465)
    assert data.complete(DataConfig(name="digits", std=(0.5,))) == DataConfig(name="digits", mean=(0.3,), std=(0.5,))
    assert data.complete(DataConfig(name="imagenet2012", bgr=True)).mean == (0.406, 0.456, 0.485)
    assert data.complete(DataConfig(name="svhn_cropped")).mean == ()
    with pytest.raises(ValueError, match=r"^data\.mean of svhn is not known; give a value for each of its 3"):
        data.Preprocessing.of(DataConfig(name="svhn")).check("svhn", 3, "data.")


def test_every_field_of_the_pixels_and_of_the_splits_is_one_of_the_data_section():
    for part in (data.Preprocessing, data.HeldOut):
        assert {field.name for field in dataclasses.fields(part)} <= {*names(DataConfig)}
