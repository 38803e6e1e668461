"""Published sizes: parameter counts without allocating anything."""

import math

import jax
import pytest
from flax import nnx

from srrl_jax.errors import InputError
from srrl_jax.models import Qwen3
from srrl_jax.models.presets import PRESETS, preset

PARAMETERS = {  # transformers 5.23 on the meta device
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}


def test_every_preset_is_counted():
    assert PARAMETERS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    state = nnx.state(nnx.eval_shape(lambda: Qwen3(preset(name), rngs=nnx.Rngs(0))))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_transformers(torch, name):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**PRESETS[name].to_hf()))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == PARAMETERS[name]


def test_unknown_preset():
    with pytest.raises(InputError, match="'qwen3-9b' does not exist; use one of qwen3-0.6b"):
        preset("qwen3-9b")
