"""A reward, a grader and rows of one's own: handed to `train`, or named in the recipe by import path."""

import dataclasses
import hashlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from srrl_jax.errors import InputError, told
from srrl_jax.grading import GradingItem, Judge, Verdict
from srrl_jax.imports import import_object
from srrl_jax.parallel import gather, is_main
from srrl_jax.rubrics import Criterion, Example, Message, row_faults
from srrl_jax.training.config import TrainConfig


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, and what the grader made of them; what a reward is a function of.

    Attributes:
      responses: G texts as a user sees them, without the thought.
      verdicts: of each response, one for each criterion of `example.rubrics`.
      lengths: of each completion, in tokens.
      truncated: whether a completion was cut off at its limit.
      rewards: float32 [G], by the rubric as the recipe's `reward` has it; NaN where nothing could be scored.
    """

    example: Example
    responses: Sequence[str]
    verdicts: Sequence[Sequence[Verdict]]
    lengths: Sequence[int]
    truncated: Sequence[bool]
    rewards: np.ndarray


Reward = Callable[[Group], Sequence[float] | np.ndarray]
GraderFunction = Callable[[Sequence[Message], str, Sequence[Criterion]], Sequence[bool | None | Verdict]]


def rubric_reward(group: Group) -> np.ndarray:
    """The default reward: the rubric's."""
    return group.rewards


def call_reward(reward: Reward, group: Group) -> list[float]:
    """What `reward` gives for a group, checked.

    Raises:
      InputError: it raises an error, or it is not one finite number for each response; NaN may stay where
        the rubric's is NaN.
    """
    with _named(f"reward {name_of(reward)}", f"on {group.example.prompt_id}"):
        values = reward(group)
    try:
        found = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.shape != group.rewards.shape or np.any(
        ~np.isfinite(found) & ~(np.isnan(found) & np.isnan(group.rewards))
    ):
        raise InputError(
            f"reward {name_of(reward)}: must give one finite number for each of the {len(group.rewards)} "
            f"responses to {group.example.prompt_id}, not {repr(values)[:200]}"
        )
    return found.tolist()


@dataclass(frozen=True)
class OwnJudge:
    """A grader of one's own as `Judge`: process 0 asks it, all get its verdicts.

    Raises InputError where it raises an error, or does not give one verdict for each criterion.
    """

    grader: Judge | GraderFunction
    name: str = "own"

    def grade(
        self,
        items: Sequence[GradingItem],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Verdict]]:
        return [[Verdict(*v) for v in row] for row in of_main(lambda: self._grade(items, on_progress))]

    def _grade(self, items, on_progress) -> list[list[Verdict]]:
        with _named(f"grader {name_of(self.grader)}", f"on {len(items)} responses"):
            if hasattr(self.grader, "grade"):
                given = list(cast(Judge, self.grader).grade(items, on_progress))
            else:
                given, ask = [], cast(GraderFunction, self.grader)
                for item in items:
                    given.append(ask(item.prompt, item.response, item.criteria))
                    on_progress(len(given), len(items))
        if len(given) != len(items):
            raise InputError(
                f"grader {name_of(self.grader)}: gave {len(given)} rows of verdicts on {len(items)} responses"
            )
        return [self._checked(row, item) for row, item in zip(given, items, strict=True)]

    def _checked(self, row: Any, item: GradingItem) -> list[Verdict]:
        verdicts = list(row) if isinstance(row, Iterable) else []
        met = [v.met if isinstance(v, Verdict) else v for v in verdicts]
        if len(met) != len(item.criteria) or not all(
            m is None or isinstance(m, bool | np.bool_) for m in met
        ):
            raise InputError(
                f"grader {name_of(self.grader)}: must give true, false, None or a Verdict for each of the "
                f"{len(item.criteria)} criteria, not {repr(row)[:200]}"
            )
        return [
            v if isinstance(v, Verdict) else Verdict(v, "", 1, 0) if v is None else _sure(bool(v))
            for v in verdicts
        ]


@dataclass(frozen=True)
class Own:
    """What a run has of one's own.

    Attributes:
      config: the recipe with the names of what was handed in.
      reward: the rubric's where there is no other.
      rows: training rows in place of the recipe's.
      identity: a hash of the source of each, see `srrl_jax.run.checks.check_identity`.
    """

    config: TrainConfig
    reward: Reward
    judge: OwnJudge | None
    rows: list[Example] | None
    identity: dict[str, str]


def bring(
    config: TrainConfig,
    reward: Reward | None = None,
    grader: Judge | GraderFunction | None = None,
    rows: Iterable[Example] | None = None,
) -> Own:
    """Takes what was handed in, or imports what the recipe names.

    Raises:
      InputError: a name cannot be imported, or something is not what it should be.
    """
    identity = {}
    if reward is not None:
        config = dataclasses.replace(
            config, reward=dataclasses.replace(config.reward, function=name_of(reward))
        )
    elif config.reward.function:
        reward = import_object(config.reward.function, "reward.function")
    if grader is not None:
        config = dataclasses.replace(config, grader=name_of(grader))
    elif config.judge == "own":
        grader = import_object(config.grader, "grader")
    if isinstance(grader, type):
        grader = grader()
    for key, thing in (("reward", reward), ("grader", grader)):
        if thing is not None:
            if not (callable(thing) or (key == "grader" and hasattr(thing, "grade"))):
                raise InputError(f"{key}: {name_of(thing)} is not a function, but {thing!r}")
            _check_signature(key, thing)
            identity[key] = _digest(thing)
    if rows is not None:
        rows = list(rows)
        _check_rows(rows)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train="rows"))
    return Own(config, reward or rubric_reward, OwnJudge(grader) if grader else None, rows, identity)


def try_out(own: Own, example: Example, responses: int) -> None:
    """Asks a reward and a grader of one's own about a made-up answer to a row, before anything expensive.

    Raises:
      InputError: what they give, or that they fail.
    """
    text = "This is an answer to try the recipe with."
    if own.judge:
        own.judge.grade([GradingItem(example.prompt, text, example.rubrics)])
    if own.reward is not rubric_reward:
        n = responses
        verdicts = [_sure(False) for _ in example.rubrics]
        group = Group(example, [text] * n, [verdicts] * n, [9] * n, [False] * n, np.zeros(n, np.float32))
        of_main(lambda: call_reward(own.reward, group))


def name_of(thing: Any) -> str:
    """ "module:name" of a function or a class; of an object, those of its class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def of_main(compute: Callable[[], Any]) -> Any:
    """What process 0 computes, on all of them, as JSON's types; an InputError of it is raised on all."""
    found = None
    if is_main():
        try:
            found = compute()
        except InputError as error:
            found = str(error)
    first, *_ = gather(found)
    if isinstance(first, str):
        raise InputError(first)
    return first


@contextmanager
def _named(what: str, on: str) -> Iterator[None]:
    """An error of somebody's own code as an InputError that says whose and where."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: failed {on}: {told(error)}; mend it, then run the same command") from error


def _check_signature(key: str, thing: Any) -> None:
    """Refuses what cannot be called as rewards or graders are."""
    if key == "reward":
        called, arguments = thing, ("group",)
    elif hasattr(thing, "grade"):
        called, arguments = thing.grade, ("items", "on_progress")
    else:
        called, arguments = thing, ("conversation", "response", "criteria")
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # not in Python
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        raise InputError(
            f"{key} {name_of(thing)}: is called with ({', '.join(arguments)}), but takes {signature}"
        ) from None


def _sure(met: bool) -> Verdict:
    return Verdict(met, "", 1, 0, float(met))


def _check_rows(rows: list[Any]) -> None:
    if not rows or not all(isinstance(row, Example) for row in rows):
        raise InputError("rows: must be at least one srrl_jax.rubrics.Example, see Example.from_dict")
    for number, row in enumerate(rows):
        if faults := row_faults(row.to_dict()):
            raise InputError(f"rows[{number}]: {faults[0]}")
    (repeated, times), *_ = Counter(row.prompt_id for row in rows).most_common(1)
    if times > 1:
        raise InputError(f"rows: prompt_id {repeated!r} is there twice; give each row its own")


def _digest(thing: Any) -> str:
    """Of its source, and of the rest of its module, which it may call; but not of a script's."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    try:
        text = name_of(thing) + inspect.getsource(named)
        if named.__module__ != "__main__":
            text += inspect.getsource(sys.modules[named.__module__])
    except (OSError, TypeError, KeyError):  # made without a file, or not in Python
        code = getattr(named, "__code__", None)
        text = repr((name_of(thing), code and (code.co_code, code.co_names, code.co_consts)))
    return hashlib.sha256(text.encode()).hexdigest()
