"""Sampling in 8 bits from a mixture of experts on eight virtual devices, over fsdp, tensor and expert."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_eight_devices_sample_what_one_does():
    """To rounding, but for a key or value that 8 bits round the other way; the gap is of 8 bits on both."""
    flags = "--xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compiles sooner
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("sampling_on_eight_devices.py")],
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    (tokens, logprobs, gaps), (expected_tokens, expected_logprobs, expected_gaps) = (
        report["eight"], report["one"],
    )  # fmt: skip
    assert tokens == expected_tokens and len(tokens) == 10
    assert min(map(len, tokens)) < max(map(len, tokens)) == 8  # some stopped
    np.testing.assert_allclose(sum(logprobs, []), sum(expected_logprobs, []), rtol=0, atol=2e-3)
    np.testing.assert_allclose(gaps, expected_gaps[:4], rtol=0, atol=2e-3)
    assert (len(gaps), len(expected_gaps)) == (4, 5), "each device measures what its pack has room for"
    assert 1e-4 < np.mean(gaps) < 0.1
