"""The one interface of all graders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from srrl_jax.grading.asking import GradingItem
from srrl_jax.grading.grader import Grader
from srrl_jax.grading.voting import Verdict


class Judge(Protocol):
    """Gives one verdict for every criterion of every item; `name` is what tables call it."""

    name: str

    def grade(
        self, items: Sequence[GradingItem], on_progress: Callable[[int, int], None] = ...
    ) -> list[list[Verdict]]: ...


@dataclass(frozen=True)
class WeightsJudge:
    """A grader with the weights of the moment, and the key of its draws."""

    grader: Grader
    params: Any
    key: jax.Array
    name: str = "policy"

    def grade(
        self,
        items: Sequence[GradingItem],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Verdict]]:
        return self.grader.grade(self.params, items, self.key, on_progress)
