"""The one interface of all graders."""

from collections.abc import Callable, Sequence
from typing import Protocol

from srrl_jax.grading.asking import GradingItem
from srrl_jax.grading.voting import Verdict


class Judge(Protocol):
    """Gives one verdict for every criterion of every item; `name` is what tables call it."""

    name: str

    def grade(
        self, items: Sequence[GradingItem], on_wave: Callable[[int, int], None] = ...
    ) -> list[list[Verdict]]: ...
