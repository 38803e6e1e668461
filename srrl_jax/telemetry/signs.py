"""Signs that sampling or grading was in vain: what training and the commands look for alike."""

import sys
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping

SIGNS = {
    "grader/unscorable": (
        "verdicts could not be read",
        "the grader's limit of new tokens (grading.max_new_tokens, --max-new-tokens) is too small for a "
        "whole reply, or it does not answer in the form that its template asks for; see the explanations",
    ),
    "grader/alike": (
        "verdicts are the same",
        "the grader says it to whatever it is asked, the responses are all alike, or the rubrics are met by "
        "every response or by none",
    ),
    "reward/zero_std_groups": (
        "groups have answers with equal rewards, so nothing is learnt from them",
        "the rubrics are met by every answer or by none, the grader says the same to all, or "
        "rollout.sampling.temperature is too low for the answers to differ",
    ),
    "completions/truncated": (
        "completions were cut off",
        "the limit of new tokens (rollout.max_new_tokens, --max-new-tokens) is too small, or the model does "
        "not end its answers: its chat template or stop tokens may be those of another model",
    ),
    "completions/empty": (
        "completions are empty",
        "the chat template is of another model (it opens a thought that this one does not know, or none), so "
        "that it stops at once; or a thought takes the whole limit of new tokens",
    ),
    "completions/same": (
        "prompts got the same completion",
        "the chat template is of another model, or leaves the prompt out; or the weights are damaged",
    ),
}
"""Shares that tell of a failure where they are (almost) 1: what of, and the likely causes."""

MOST = 0.9
"""From this share on a command warns; training warns of all."""

_FEW_PROMPTS, _FEW_VERDICTS = 4, 20  # fewer may well be alike


def completion_shares(completions: Iterable[tuple[str, str, bool]]) -> dict[str, float]:
    """Shares, by the names of `SIGNS`, of completions; {} for none.

    Args:
      completions: prompt_id, response (what a user would see) and whether it was cut off, of each.
    """
    found = list(completions)
    if not found:
        return {}
    shares = {
        "completions/truncated": sum(truncated for *_, truncated in found) / len(found),
        "completions/empty": sum(not response.strip() for _, response, _ in found) / len(found),
    }
    prompts = defaultdict(set)
    for prompt_id, response, _ in found:
        prompts[prompt_id].add(response)
    if len(prompts) >= _FEW_PROMPTS:
        ((_, most),) = Counter(text for texts in prompts.values() for text in texts).most_common(1)
        shares["completions/same"] = most / len(prompts)
    return shares


def verdict_shares(verdicts: Iterable[bool | None]) -> dict[str, float]:
    """Shares, by the names of `SIGNS`, of verdicts; {} for none."""
    counts = Counter(verdicts)
    if not counts:
        return {}
    read = counts[True] + counts[False]
    shares = {"grader/unscorable": counts[None] / counts.total()}
    if read >= _FEW_VERDICTS:
        shares["grader/alike"] = max(counts[True], counts[False]) / read
    return shares


def warnings_of(shares: Mapping[str, float], least: float = 1.0, but: Container[str] = ()) -> dict[str, str]:
    """Messages of the signs whose share is at least so much, by their names; `but` those named."""
    found = [name for name in SIGNS if shares.get(name, 0) >= least and name not in but]
    return {
        name: f"{'all' if shares[name] == 1 else f'{shares[name]:.0%} of'} {SIGNS[name][0]}. "
        f"Likely cause: {SIGNS[name][1]}"
        for name in found
    }


def tell(shares: Mapping[str, float], told: set[str]) -> None:
    """Warns on stderr of the signs in what a command has made, once each; `told` grows."""
    found = warnings_of(shares, MOST, told)
    for message in found.values():
        print(f"srrl: warning: {message}", file=sys.stderr)
    told.update(found)
