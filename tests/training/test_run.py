"""What may change when a run goes on, and what a refused run leaves behind."""

import pytest
import yaml

from srrl_jax.errors import InputError
from srrl_jax.training.run import check_run, write_config


@pytest.fixture
def begun(recipe, tmp_path):
    """A run directory with a checkpoint of step 2."""
    write_config(recipe(tmp_path, "steps=4"))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("steps=9", "steps was 4, now 9"),
        ("steps=2", "steps was 4, now 2"),
        ("eval.every=3", "eval.every was 10, now 3"),
        ("checkpoint.keep=7", "checkpoint.keep was 2, now 7"),
        ("checkpoint.preemption_seconds=5", "checkpoint.preemption_seconds was 25.0, now 5.0"),
        ("mesh.fsdp=1", "mesh.fsdp was -1, now 1"),
        ("profile=[2]", "profile was [], now [2]"),
        ("reference=host", "reference was 'device', now 'host'"),
    ],
)
def test_harmless_changes_are_accepted_and_told(recipe, begun, override, change):
    assert check_run(recipe(begun, "steps=4", override)) == [change]
    assert check_run(recipe(begun, "steps=4")) == []


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=3", "seed was 0, now 3"),
        ("grading.tries=1", "grading.tries was 2, now 1"),
        ("group_size=3", "group_size was 2, now 3"),
        ("steps=1", "has done 2 already, more than 1"),
    ],
)
def test_other_changes_are_refused_and_nothing_is_written(recipe, begun, override, difference):
    before = (begun / "config.yaml").read_text()
    with pytest.raises(InputError) as error:
        check_run(recipe(begun, "steps=4", override))
    assert difference in str(error.value)
    assert (begun / "config.yaml").read_text() == before


def test_a_run_without_a_checkpoint_may_change_its_recipe(recipe, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    config = recipe(tmp_path)
    assert check_run(config) == []
    write_config(config)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config.to_dict()


def test_a_moved_run_goes_on_where_it_is(recipe, begun, tmp_path):
    moved = begun.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    assert check_run(recipe(moved, "steps=4")) == []


def test_a_check_makes_no_directory(recipe, tmp_path):
    check_run(recipe(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="run_dir: cannot write"):
        check_run(recipe(tmp_path / "file" / "b"))


def test_a_trace_is_refused_where_it_cannot_be_written(recipe, bucket):
    assert check_run(recipe(bucket / "run")) == []
    with pytest.raises(InputError, match="profile: .*disks"):
        check_run(recipe(bucket / "run", "profile=[1]"))
