"""Which metrics the report and the viewer show, as tables."""

from typing import NamedTuple


class Chart(NamedTuple):
    """Lines over the steps, {metric: label}; the axis of a `fraction` goes from 0 to at most 1."""

    title: str
    note: str
    fraction: bool
    lines: dict[str, str]


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
    "eval/unscorable": "Unscorable, held-out",
    "grader/agreement_frozen": "Agreement with the frozen grader",
    "grader/control_met_rate": "Met by empty answers (controls)",
    "grader/agreement_teacher": "Agreement with the teacher",
}
_CLIPPED = {"clip_frac/low": "Clipped low", "clip_frac/high": "Clipped high"}
_HACKING = (
    "A self-given reward that climbs while an outside score does not is reward hacking:"
    " the policy learns to please its own grader."
)
_MET = "Share of criteria judged met. Unscorable verdicts could not be read and count neither way."

CHARTS = [
    Chart("Reward", _HACKING, False, _REWARDS),
    Chart("Grader", _MET, True, _VERDICTS),
    Chart("Distance", "From its reference, nats a token.", False, {"kl": "KL to the reference"}),
    Chart("Diversity", "How varied sampling still is, nats a token.", False, {"entropy": "Entropy"}),
    Chart("Length", "Tokens of a completion.", False, {"completions/mean_length": "Mean length"}),
    Chart("Truncated", "Reached the limit without ending.", True, {"completions/truncated": "Truncated"}),
    Chart("Gradient", "Its norm, over all weights.", False, {"grad_norm": "Gradient norm"}),
    Chart("Clipped", "Share of tokens whose policy ratio was clipped.", True, _CLIPPED),
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
