"""Which metrics the report and the viewer show, as tables."""

from typing import NamedTuple


class MetricPanel(NamedTuple):
    """Lines over a common step axis, {metric: label}; a `fraction` has an axis from 0 to at most 1."""

    heading: str
    fraction: bool
    lines: dict[str, str]


class MetricChart(NamedTuple):
    """Panels above each other, and what a reader should know of them."""

    title: str
    note: str
    panels: list[MetricPanel]


_REWARDS = {
    "reward/mean": "Self-given reward",
    "eval/self": "Held-out, self-graded",
    "eval/frozen": "Held-out, graded by the frozen start",
    "eval/teacher": "Held-out, graded by the teacher",
    "eval/own": "Held-out, graded by the grader of one's own",
}
_VERDICTS = {
    "grader/met_rate": "Met, all criteria",
    "grader/met_rate_negative": "Met, negative criteria",
    "grader/unscorable": "Unscorable",
    "grader/agreement_frozen": "Agreement with the frozen grader",
    "grader/control_met_rate": "Met by empty answers (controls)",
    "grader/agreement_teacher": "Agreement with the teacher",
}
_CLIPPED = {"clip_frac/low": "Clipped low", "clip_frac/high": "Clipped high"}
_HACKING = (
    "A self-given reward that climbs while an outside score does not is reward hacking:"
    " the policy learns to please its own grader."
)
_MOVED = "How far the policy has moved from its reference, and how varied its sampling still is."
_TRUNCATED = "Truncated ones reached the length limit without ending."
_MET = "Fraction of criteria judged met. Unscorable verdicts could not be read and count neither way."
_SIZES = "Size of the gradient, and the fraction of tokens where the policy ratio was clipped."

_KL = MetricPanel("KL (nats a token)", False, {"kl": "KL to the reference"})
_ENTROPY = MetricPanel("entropy (nats a token)", False, {"entropy": "Entropy"})
_LENGTH = MetricPanel("tokens", False, {"completions/mean_length": "Mean length"})
_SHARE = MetricPanel("fraction truncated", True, {"completions/truncated": "Truncated"})
_GRADIENT = MetricPanel("gradient norm", False, {"grad_norm": "Gradient norm"})

CHARTS = [
    MetricChart("Reward", _HACKING, [MetricPanel("score", False, _REWARDS)]),
    MetricChart("Distance and diversity", _MOVED, [_KL, _ENTROPY]),
    MetricChart("Completions", _TRUNCATED, [_LENGTH, _SHARE]),
    MetricChart("Grader", _MET, [MetricPanel("fraction", True, _VERDICTS)]),
    MetricChart("Updates", _SIZES, [_GRADIENT, MetricPanel("fraction clipped", True, _CLIPPED)]),
]

TILES = {
    "reward/mean": "Self-given reward",
    "eval/self": "Held-out, self-graded",
    "kl": "KL to the reference",
    "entropy": "Entropy",
    "completions/mean_length": "Completion length",
    "grader/unscorable": "Unscorable verdicts",
    "perf/tokens_per_s": "Tokens per second",
    "perf/verdicts_per_s": "Verdicts per second",
    "perf/mfu": "Update, of the chips' peak",
}
"""Key numbers: {metric: label}."""
