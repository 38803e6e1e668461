"""A teacher: a model behind an OpenAI-compatible endpoint as judge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pydantic

from srrl_jax import storage
from srrl_jax.errors import InputError
from srrl_jax.grading.asking import GradingItem
from srrl_jax.grading.config import AskingConfig
from srrl_jax.grading.endpoint import Endpoint, EndpointConfig, Usage
from srrl_jax.grading.voting import Query, Reply, Verdict, collect_verdicts
from srrl_jax.parallel import gather, is_main
from srrl_jax.rubrics import criteria_prompt, criterion_prompt, grader_prompt, template_sha256

DECIDES = ("base_url", "model", "system", "parameters", "template", "tries", "votes", "together")
"""The keys that decide verdicts; the others decide speed and cost."""


@dataclass(frozen=True)
class TeacherConfig(EndpointConfig, AskingConfig):
    """An endpoint, and how it is asked."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        EndpointConfig.__post_init__(self)
        AskingConfig.__post_init__(self)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a YAML file of these keys. Raises InputError that names file and key."""
        try:
            return pydantic.TypeAdapter(cls).validate_python(storage.read_yaml(path))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{path}: {key + ': ' if key else ''}{message}") from None


class Teacher:
    """Grades responses by asking an endpoint; a context manager.

    Of several processes the first asks, and tells the others.

    Raises:
      InputError: no key, no such template, or an unusable cache; before anything is asked.
    """

    def __init__(self, config: TeacherConfig):
        self.config, self.name = config, config.model
        self._template = config.read_template()
        self._endpoint = Endpoint(config) if is_main() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._endpoint:
            self._endpoint.close()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides verdicts."""
        decides = {name: getattr(self.config, name) for name in DECIDES}
        return decides | {"template_sha256": template_sha256(self._template)}

    @property
    def usage(self) -> Usage:
        """What was asked and paid in this process so far."""
        return self._endpoint.usage if self._endpoint else Usage()

    def grade(
        self,
        items: Sequence[GradingItem],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[Verdict]]:
        """One verdict for every criterion of every item.

        Args:
          on_progress: told replies of a try and their total, as they arrive.
        Raises:
          InputError: the endpoint cannot be used, see `Endpoint.ask`; what it said is in the cache.
        """
        found = None
        if is_main():
            try:
                found = self._collect_verdicts(items, on_progress)
            except InputError as error:
                found = str(error)
        first, *_ = gather(found)
        if isinstance(first, str):
            raise InputError(first)
        return [[Verdict(*verdict) for verdict in row] for row in first]

    def _collect_verdicts(self, items, on_progress) -> list[list[Verdict]]:
        votes, template = self.config.votes, self._template
        before = [grader_prompt(template, item.prompt, item.response) for item in items]

        def prompt(i: int, query: Query) -> str:
            criteria = [items[i].criteria[c] for c in query]
            one = len(criteria) == 1
            return before[i] + (
                criterion_prompt(template, *criteria) if one else criteria_prompt(template, criteria)
            )

        def ask(attempt: int, asked: Mapping[int, Sequence[Query]]) -> list[list[Reply]]:
            prompts = [
                (prompt(i, query), attempt * votes + vote)
                for i, queries in asked.items()
                for query in queries
                for vote in range(votes)
            ]
            replies = iter(self._endpoint.ask(prompts, on_progress))
            return [
                [Reply(r.text, r.completion_tokens) if (r := next(replies)) else Reply("", 0)
                 for _ in range(len(queries) * votes)]
                for queries in asked.values()
            ]  # fmt: skip

        criteria = [len(item.criteria) for item in items]
        return collect_verdicts(
            criteria,
            range(len(items)),
            ask,
            tries=self.config.tries,
            votes=votes,
            together=self.config.together,
        )
