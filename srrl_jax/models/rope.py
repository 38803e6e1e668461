"""Rotary position embeddings: the types that a `config.json` may name, and how they turn a vector."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srrl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for positions beyond those of pretraining.

    Attributes:
      rope_type: "linear" divides every frequency by `factor`; "yarn" (arXiv 2309.00071) only those that
        turn less than `beta_slow` times over the original length, leaves those that turn more than
        `beta_fast` times, and blends in between. "llama3" (arXiv 2407.21783) does so by `low_freq_factor` and
        `high_freq_factor`, and blends otherwise. The rest of the fields is for yarn.
      original_max_position_embeddings: positions of pretraining.
      attention_factor: scale of cosines and sines.
      truncate: whether the bounds of the blend are rounded outwards to whole dimensions.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def to_hf(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        turns = ["low_freq_factor", "high_freq_factor"]
        if self.rope_type == "yarn":
            return {key: value for key, value in fields.items() if key not in turns}
        more = ["original_max_position_embeddings", *turns] if self.rope_type == "llama3" else []
        return {key: fields[key] for key in ("rope_type", "factor", *more)}


def read_rope(
    fields: dict[str, Any], max_position_embeddings: int, where: str
) -> tuple[float, RopeScaling | None]:
    """Takes theta and scaling out of `fields`: the flat form, or the nested one of transformers 5.

    Raises:
      InputError: a type other than default, linear, yarn and llama3, or a field that its type does not have
        (the message starts with `where` and names it).
    """
    theta = fields.pop("rope_theta", 10000.0)  # what transformers takes when the file is silent
    forms = [form for name in ("rope_scaling", "rope_parameters") if (form := fields.pop(name, None))]
    if not all(isinstance(form, dict) for form in forms):
        raise InputError(f"{where}: rope_scaling and rope_parameters must be objects or null")
    if len(forms) == 2 and forms[0] != forms[1]:
        raise InputError(f"{where}: rope_scaling and rope_parameters differ; remove one of them")
    nested = dict(forms[0]) if forms else {}
    kind = nested.pop("type", "default")
    kind = nested.pop("rope_type", kind)
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise InputError(
            f"{where}: rope type {kind!r} is not supported; only default, linear, yarn and llama3 are"
        )

    def number(key: str, value: Any, above: float = 0.0) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < math.inf:
            raise InputError(f"{where}: {key} of the rope parameters must be a number over {above:g}")
        return float(value)

    theta = number("rope_theta", nested.pop("rope_theta", theta), above=1.0)
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", number("factor", nested.pop("factor", None)))
    elif kind == "llama3":
        length = nested.pop("original_max_position_embeddings", max_position_embeddings)
        names = ("factor", "low_freq_factor", "high_freq_factor")
        factor, low, high = (number(name, nested.pop(name, None)) for name in names)
        if not low < high:
            raise InputError(
                f"{where}: low_freq_factor of the rope parameters must be below high_freq_factor"
            )
        length = int(number("original_max_position_embeddings", length))
        scaling = RopeScaling("llama3", factor, length, low_freq_factor=low, high_freq_factor=high)
    elif kind == "yarn":
        original = number(
            "original_max_position_embeddings",
            nested.pop("original_max_position_embeddings", max_position_embeddings),
        )
        if "factor" in nested and nested["factor"] is None:
            nested["factor"] = max_position_embeddings / original
        factor = number("factor", nested.pop("factor", None))
        scales = [nested.pop(key, None) for key in ("mscale", "mscale_all_dim")]
        attention = nested.pop("attention_factor", None)
        if attention is None and all(scales):
            attention = _mscale(factor, scales[0]) / _mscale(factor, scales[1])
        elif attention is None:
            attention = _mscale(factor, 1.0)
        scaling = RopeScaling(
            "yarn",
            factor,
            int(original),
            number("attention_factor", attention),
            number("beta_fast", nested.pop("beta_fast", None) or 32.0),
            number("beta_slow", nested.pop("beta_slow", None) or 1.0),
            bool(nested.pop("truncate", True)),
        )
    if nested:
        raise InputError(
            f"{where}: rope type {kind!r} with field(s) {', '.join(sorted(nested))} is not understood; "
            "remove them if they do not change the forward pass"
        )
    return theta, scaling


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position, float32 [head_dim / 2], rounded where `transformers` rounds.

    Made on the host: an ulp of a frequency is a thousandth of a radian at position 30,000. Source:
    transformers 5.23, `modeling_rope_utils.py`.
    """
    one = np.float32(1)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    period = (theta ** exponent.astype(np.float64)).astype(np.float32)
    plain = one / period
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / np.float32(scaling.factor)

    if scaling.rope_type == "llama3":
        length, low, high = map(
            np.float32,
            (scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor),
        )
        # torch divides a number by an array by way of its reciprocal.
        wavelength, factor = one / plain * np.float32(2 * math.pi), np.float32(scaling.factor)
        kept = one / wavelength * length - low
        kept /= np.float32(scaling.high_freq_factor - scaling.low_freq_factor)
        blended = (one - kept) * plain / factor + kept * plain
        slow, fast = wavelength > length / low, wavelength < length / high
        return np.where(slow, plain / factor, np.where(fast, plain, blended))

    def dimension(turns: float) -> float:
        """Where a frequency makes so many turns over the original length."""
        length = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretched = one / (np.float32(scaling.factor) * period)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    kept = one - np.clip(ramp, 0, 1)
    return stretched * (one - kept) + plain * kept


def rope(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [..., head_dim / 2], of `positions` [...]."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(head_dim, theta, scaling)
    factor = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies RoPE to `x` [..., heads, D] in the half-split form of `transformers`."""
    cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
