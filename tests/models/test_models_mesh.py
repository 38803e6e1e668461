"""Head and attention kernels on eight virtual devices: rows over data and fsdp, the rest over tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def eight():
    """Numbers of models_on_eight_devices.py."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("models_on_eight_devices.py")],
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["cut", "whole vocabulary", "whole rows"])
def test_head_equals_one_device(eight, name):
    """Where an axis divides the sizes, and where it stays whole."""
    assert max(eight[name]["errors"]) < 2e-6


def test_the_head_is_gathered_a_chunk_at_a_time(eight):
    """Of a device's 22 rows of 8, 6 in each of 4 chunks; its half of the columns comes from fsdp."""
    assert eight["cut"]["gathered"] == [6 * 8]


@pytest.mark.parametrize("name", ["splash", "splash, whole rows", "splash, whole heads", "cudnn"])
def test_attention_equals_xla_on_one_device(eight, name):
    assert max(eight[name]["errors"]) < 5e-6


def test_experts_are_loaded_into_the_devices_that_hold_them(eight):
    """Expert by expert of [2, 8, 8, 16], whichever axes cut them."""
    assert eight["experts"] == {
        "(1, 1, 1, 1, 8)": [[2, 1, 8, 16], True],
        "(1, 1, 2, 2, 2)": [[2, 4, 4, 8], True],
        "(1, 1, 8, 1, 1)": [[2, 8, 8, 2], True],
    }
