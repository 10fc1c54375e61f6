"""The profile of a step: operations are of the right kind, times add up, and errors are one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddnp_jax.convolutions import with_fast_convolutions
from ddnp_jax.models.layers import depthwise_conv
from experiments import profile
from experiments.profile import COPIES, GRADIENTS, MATRIX_PRODUCTS, NORMALIZATION, OTHER, OUTPUTS, Event, Operation

ROOT = Path(__file__).parents[1]
PROGRAM = """HloModule jit_chunk

%fused_computation.1 (param_0: f32[8,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  ROOT %mul.1 = f32[8,4]{1,0} multiply(%param_0, %param_0), metadata={op_name="jit(chunk)/jvp(Net)/bn/mul"}
}

%fused_computation.2 (param_0: f32[2,4,4,3], param_1: f32[3,3,3,5]) -> f32[2,4,4,5] {
  %param_0 = f32[2,4,4,3]{3,2,1,0} parameter(0)
  %param_1 = f32[3,3,3,5]{3,2,1,0} parameter(1)
  ROOT %convolution.1 = f32[2,4,4,5]{3,2,1,0} convolution(%param_0, %param_1), dim_labels=b01f_01io->b01f
}

ENTRY %main (x: f32[2,4,4,3], k: f32[3,3,3,5]) -> f32[8,4] {
  %x = f32[2,4,4,3]{3,2,1,0} parameter(0)
  %fusion.1 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused_computation.1, metadata={op_name="jit(chunk)/add"}
  %ynn_fusion.2 = f32[2,4,4,5]{3,2,1,0} fusion(%x, %k), calls=%fused_computation.2, metadata={op_name="jvp(Net)/c"}
  %conv.7 = f32[2,4,4,3]{3,2,1,0} convolution(%x, %k), dim_labels=b01f_01io->b01f, metadata={op_name="transpose()"}
  %conv.8 = f32[3,3,3,5]{3,2,1,0} convolution(%x, %x), dim_labels=f01b_i01o->01bf, metadata={op_name="transpose()"}
  %dot.1 = f32[8,8]{1,0} dot(%fusion.1, %fusion.1), metadata={op_name="jit(chunk)/jvp(Net)/dense"}
  %copy.416 = f32[8,4]{0,1} copy(%fusion.1)
  %while.1 = (s32[], f32[8,4]{1,0}) while(%fusion.1), condition=%c, body=%b, metadata={op_name="jit(chunk)/scan"}
}
"""


def test_operations_of_a_program():
    found = profile.operations(PROGRAM, "Net")
    expected = {
        "fusion.1": Operation(NORMALIZATION, NORMALIZATION, "f32[8,4]"),  # by what is fused
        "ynn_fusion.2": Operation(OUTPUTS, "output", "f32[2,4,4,5]"),
        "conv.7": Operation(GRADIENTS, "gradient of the input", "f32[2,4,4,3]"),
        "conv.8": Operation(GRADIENTS, "gradient of the kernel", "f32[3,3,3,5]"),
        "dot.1": Operation(MATRIX_PRODUCTS, MATRIX_PRODUCTS, "f32[8,8]"),
        "copy.416": Operation(COPIES, COPIES, "f32[8,4]"),
        "while.1": Operation(OTHER, OTHER, "(s32[], f32[8,4])"),
    }
    assert {name: found[name] for name in expected} == expected


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(40, (3, 3))(x))
        x = nn.Conv(40, (5, 5), strides=2)(x)
        return nn.Conv(40, (3, 3), feature_group_count=40, conv_general_dilated=depthwise_conv)(nn.relu(x)).mean((1, 2))


def test_operations_of_a_training_step():
    x = np.zeros((4, 8, 8, 20), np.float32)
    variables = Net().init(jax.random.key(0), x)

    def loss(variables, x):
        forward = with_fast_convolutions(lambda v, x: Net().apply(v, x, mutable=["batch_stats"])[0])
        return jnp.square(forward(variables, x)).sum()

    program = jax.jit(jax.grad(loss, (0, 1))).lower(variables, x).compile().as_text()
    found = set(profile.operations(program, "Net").values())
    assert {o.detail for o in found if o.kind == GRADIENTS} == {"gradient of the input", "gradient of the kernel"}
    assert Operation(OUTPUTS, "output", "f32[4,8,8,40]") in found
    assert Operation(GRADIENTS, "gradient of the input", "f32[4,8,8,20]") in found
    assert Operation(GRADIENTS, "gradient of the kernel", "f32[40,5,5,40]") in found  # of the one with stride
    assert Operation(GRADIENTS, "gradient of the input", "f32[4,8,8,40]") in found
    assert Operation(OUTPUTS, "output", "f32[4,4,4,40]") in found
    assert {o.detail for o in found if o.shape == "f32[60,120]"} - {COPIES} == {"gradient of the kernel"}


def test_times_are_without_those_of_the_operations_inside():
    events = [Event("while", 0, 100), Event("dot", 10, 20), Event("dot", 40, 30), Event("add", 45, 5)]
    events += [Event("dot", 100, 7)]
    assert profile.self_times(reversed(events)) == {"while": 50, "dot": 20 + 25 + 7, "add": 5}


def test_operators_of_pytorch():
    kinds = {
        "aten::addmm": MATRIX_PRODUCTS,
        "aten::add_": NORMALIZATION,
        "aten::native_batch_norm_backward": NORMALIZATION,
        "aten::mkldnn_convolution": OUTPUTS,
        "aten::convolution_backward": GRADIENTS,
        "aten::copy_": COPIES,
        "aten::multinomial": OTHER,
    }
    assert {name: profile.kind_in_pytorch(name) for name in kinds} == kinds


def test_tables():
    own = {
        Operation(OUTPUTS, "output", "f32[2]"): (3, 6.0),
        Operation(GRADIENTS, "gradient of the kernel", "f32[3]"): (2, 9.0),
        Operation(OUTPUTS, "output", "f32[4]"): (1, 5.0),
    }
    lines = profile.tables(own, {**dict.fromkeys(profile.KINDS, 0.0), OUTPUTS: 8.0, OTHER: 2.5}, 2).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    assert cells[2] == [OUTPUTS, "11.0", "55.0", "8.0"]
    assert cells[8] == ["all", "20.0", "100.0", "10.5"]
    assert cells[-2:] == [
        ["gradient of the kernel", "f32[3]", "2", "9.0", "45.0"],
        ["output", "f32[2]", "3", "6.0", "30.0"],
    ]
    assert {line.strip("|").split("|")[-1].strip() for line in profile.tables(own, None, 1).splitlines()[2:9]} == {"-"}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--network=resnet", "--network='resnet' is unknown; use one of resnet56, mobilenet_v2, resnet50."),
        ("--stage=data", "--stage='data' is unknown; use one of search, training, evaluation."),
        ("--steps=0", "--steps=0 must be at least 1."),
    ],
)
def test_wrong_flags_are_one_sentence(flag, message):
    with pytest.raises(ValueError) as error:
        profile.parse([flag])
    assert str(error.value) == message


def test_the_command_profiles_both():
    command = [sys.executable, "-m", "experiments.profile", "--stage=evaluation", "--batch_size=2", "--steps=1"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {**os.environ, "XLA_FLAGS": flags}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.startswith("resnet56, evaluation, 2 images, one core.\n\n| operations ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()[2:11]]
    times = {row[0]: (float(row[1]), float(row[3])) for row in cells[2:]}
    for column in (0, 1):
        assert 0 < times[OUTPUTS][column] < times["all"][column]
        assert times[GRADIENTS][column] == 0
        assert sum(t[column] for t in times.values()) == pytest.approx(2 * times["all"][column], abs=0.5)
