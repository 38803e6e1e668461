"""Outputs that tell of a failure, and those that do not."""

import pytest

from srrl_jax.telemetry.signs import MOST, completion_shares, tell, verdict_shares, warnings_of

FINE = [(f"q{i}", f"answer {i}", i == 0) for i in range(10)]


def signs(completions=(), verdicts=()) -> set[str]:
    shares = completion_shares(completions) | verdict_shares(verdicts)
    return set(warnings_of(shares, MOST))


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (lambda i: (f"p{i}", "" if i else f"{i}", False), "completions/empty"),
        (lambda i: (f"p{i}", "\n", False), "completions/empty"),
        (lambda i: (f"p{i}", f"{i}", i > 0), "completions/truncated"),
        (lambda i: (f"p{i}", "the same" if i else "another", False), "completions/same"),
    ],
)
def test_most_completions_tell(change, sign):
    assert sign in signs([change(i) for i in range(10)])
    assert sign not in signs([*map(change, range(10)), *FINE])


def test_completions_in_order_tell_nothing():
    assert signs(FINE) == signs([]) == set()
    assert signs([("p", "the same", False)] * 10) == set()  # of one prompt, as at temperature 0


def test_verdicts_tell():
    assert signs(verdicts=[None] * 9 + [True]) == {"grader/unscorable"}
    assert signs(verdicts=[False] * 19 + [True]) == {"grader/alike"}
    assert signs(verdicts=[True] * 19) == set()  # too few
    assert signs(verdicts=[True, False, None] * 10) == signs() == set()


def test_a_command_tells_each_once_with_its_causes(capsys):
    told = set()
    for _ in range(2):
        tell({"completions/empty": 0.95, "completions/truncated": 0.2}, told)
    said = capsys.readouterr().err
    assert said.count("srrl: warning: ") == 1
    assert said.startswith("srrl: warning: 95% of completions are empty. Likely cause: the chat template")
