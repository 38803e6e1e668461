"""Which metrics the report and the viewer draw together, as a table."""

from typing import NamedTuple


class Chart(NamedTuple):
    """A chart of one or two panels over a common step axis.

    Attributes:
      panels: (heading, whether it is a fraction from 0 to 1, {metric: label}) of each.
    """

    title: str
    note: str
    panels: tuple[tuple[str, bool, dict[str, str]], ...]


CHARTS = (
    Chart(
        "Reward",
        "A self-given reward that climbs while an outside score does not is reward hacking: the policy "
        "learns to please its own grader.",
        (
            (
                "score",
                False,
                {
                    "reward/mean": "Self-given reward",
                    "eval/self": "Held-out, self-graded",
                    "eval/frozen": "Held-out, graded by the frozen start",
                    "eval/teacher": "Held-out, graded by the teacher",
                },
            ),
        ),
    ),
    Chart(
        "Distance and diversity",
        "How far the policy has moved from its reference, and how varied its sampling still is.",
        (
            ("KL (nats a token)", False, {"kl": "KL to the reference"}),
            ("entropy (nats a token)", False, {"entropy": "Entropy"}),
        ),
    ),
    Chart(
        "Completions",
        "Truncated ones reached the length limit without ending.",
        (
            ("tokens", False, {"completions/mean_length": "Mean length"}),
            ("fraction truncated", True, {"completions/truncated": "Truncated"}),
        ),
    ),
    Chart(
        "Grader",
        "Fraction of criteria judged met. Unscorable verdicts could not be read and count neither way.",
        (
            (
                "fraction",
                True,
                {
                    "grader/met_rate": "Met, all criteria",
                    "grader/met_rate_negative": "Met, negative criteria",
                    "grader/unscorable": "Unscorable",
                    "grader/agreement_frozen": "Agreement with the frozen grader",
                    "grader/agreement_teacher": "Agreement with the teacher",
                },
            ),
        ),
    ),
    Chart(
        "Updates",
        "Size of the gradient, and the fraction of tokens where the policy ratio was clipped.",
        (
            ("gradient norm", False, {"grad_norm": "Gradient norm"}),
            ("fraction clipped", True, {"clip_frac/low": "Clipped low", "clip_frac/high": "Clipped high"}),
        ),
    ),
)
