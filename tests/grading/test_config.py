"""What judges are asked with is checked in one place, whoever asks."""

import pytest

from srrl_jax.errors import InputError
from srrl_jax.grading import AskingConfig, JudgeConfig, TeacherConfig
from srrl_jax.training import TrainConfig
from srrl_jax.training.config import GradingConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tries": 0}, "tries: must be at least 1"),
        ({"votes": 2}, "votes: must be odd"),
        ({"votes": 0}, "votes: must be odd"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"verdict": "logits", "votes": 3}, "votes: verdicts from logits are all the same"),
        ({"verdict": "logits", "together": True}, "together: needs a reply that is written out"),
        ({"verdict": "constrained", "thinking": True}, "thinking: needs a reply that is written out"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        JudgeConfig(**settings)
    with pytest.raises(InputError, match=rf"grading: {message}"):
        overrides = [f"grading.{key}={value}" for key, value in settings.items()]
        TrainConfig.load("configs/demo.yaml", overrides)


def test_recipes_and_teachers_are_asked_alike():
    assert issubclass(GradingConfig, JudgeConfig) and issubclass(TeacherConfig, AskingConfig)
    with pytest.raises(InputError, match="int8: needs a reply that is written out"):
        TrainConfig.load("configs/demo.yaml", ["grading.verdict=logits", "grading.int8=weights"])


def test_a_template_that_cannot_be_read_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="template: cannot read .*none.txt"):
        AskingConfig(template=str(tmp_path / "none.txt")).read_template()
