"""How judges are asked for verdicts, as recipes, commands and a teacher's YAML say it."""

from dataclasses import dataclass
from typing import Literal

from srrl_jax.errors import InputError
from srrl_jax.rubrics import load_template
from srrl_jax.sampling import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class AskingConfig:
    """How any judge is asked.

    Attributes:
      template: "shared", "healthbench", or the path of a template file (`srrl_jax.rubrics.load_template`).
      tries: replies for a criterion before it is unscorable.
      votes: replies or draws for each criterion, of which the majority counts; odd.
      together: ask for all criteria of a response in one query, which is cheaper.
    """

    template: str = "shared"
    tries: int = 3
    votes: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InputError(f"tries: must be at least 1, not {self.tries}")
        if self.votes < 1 or self.votes % 2 == 0:
            raise InputError(f"votes: must be odd, so that a majority is clear, not {self.votes}")

    def read_template(self) -> str:
        """The template's text. Raises InputError where it cannot be read or is none."""
        try:
            return load_template(self.template)
        except ValueError as error:
            raise InputError(f"template: {error}") from None


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(AskingConfig):
    """How weights that are here are asked.

    Attributes:
      max_new_tokens: limit of a verdict with its explanation.
      verdict: "generate" samples a reply with an explanation; "constrained" draws true or false alone,
        "logits" takes the likelier of the two (see `Grader`).
      calibrate: "controls" has what is not written out decided against the same criteria on an empty answer
        (see `Grader`).
      thinking: whether the chat template asks for a <think> block.
    """

    max_new_tokens: int = 256
    verdict: Literal["generate", "constrained", "logits"] = "generate"
    calibrate: Literal["none", "controls"] = "none"
    thinking: bool = False
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_k=20, top_p=0.95)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: must be at least 1, not {self.max_new_tokens}")
        if self.verdict == "logits" and self.votes > 1:
            raise InputError("votes: verdicts from logits are all the same; set 1, or verdict: constrained")
        if self.verdict == "generate" and self.calibrate != "none":
            raise InputError(
                f"calibrate: {self.calibrate} moves the threshold of a probability, which a reply that is "
                "written out has none of; set it none, or verdict: logits"
            )
        for key in ("together", "thinking"):
            if self.verdict != "generate" and getattr(self, key):
                raise InputError(
                    f"{key}: needs a reply that is written out; set it false, or verdict: generate"
                )
