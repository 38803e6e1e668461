import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import yaml

from srrl_jax.errors import InputError
from srrl_jax.run import train
from srrl_jax.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs/demo.yaml"


def refused(*overrides: str, path=DEMO) -> str:
    with pytest.raises(InputError) as error:
        TrainConfig.load(path, list(overrides))
    return str(error.value)


def write(tmp_path, change) -> Path:
    values = yaml.safe_load(DEMO.read_text())
    change(values)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_loads_and_survives_a_round_trip(path):
    config = TrainConfig.load(path)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_overrides_replace_one_value_each_and_leave_the_others():
    base = TrainConfig.load(DEMO)
    config = TrainConfig.load(
        DEMO, ["steps=7", "rollout.sampling.temperature=0.8", "data.eval=null", "grading.memory_gb=2"]
    )
    assert (config.steps, config.rollout.sampling.temperature, config.data.eval) == (7, 0.8, None)
    assert config.grading.memory_gb == 2
    assert config.data.train == base.data.train and config.rollout.max_new_tokens == 64


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("rollout.prompt_buckets", "rollout.max_prompt_tokens"),
        ("rollout.completion_buckets", "rollout.max_new_tokens"),
        ("rollout.rows", "rollout.memory_gb"),
        ("grading.prefix_buckets", "follow from the rows"),
        ("grading.criterion_buckets", "follow from the rows"),
        ("grading.criteria_buckets", "follow from the rows"),
        ("grading.rows", "grading.memory_gb"),
    ],
)
def test_a_key_of_old_is_refused_with_what_took_its_place(key, instead):
    message = refused(f"{key}=[8]")
    assert f"{key}: is no key any more" in message and instead in message and "\n" not in message


def test_a_recipe_inherits_what_it_does_not_set(tmp_path):
    (tmp_path / "base.yaml").write_text(DEMO.read_text())
    (tmp_path / "heir.yaml").write_text("inherits: base.yaml\nsteps: 7\ngrading: {tries: 5}\n")
    heir, base = TrainConfig.load(tmp_path / "heir.yaml", ["seed=3"]), TrainConfig.load(DEMO)
    assert heir != base
    assert heir == TrainConfig.load(DEMO, ["steps=7", "grading.tries=5", "seed=3"])


def test_a_recipe_that_inherits_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("inherits: b.yaml")
    (tmp_path / "b.yaml").write_text("inherits: a.yaml")
    assert "inherits: leads back" in refused(path=tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("inherits: none.yaml")
    assert "none.yaml: no such file" in refused(path=tmp_path / "a.yaml")


def test_a_later_override_wins():
    assert TrainConfig.load(DEMO, ["steps=7", "steps=8"]).steps == 8


def test_numbers_in_scientific_notation_without_a_dot_are_numbers():
    assert TrainConfig.load(DEMO, ["optimizer.learning_rate=3e-4"]).optimizer.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("step", "steps"),
        ("optimizer.learning_rte", "optimizer.learning_rate"),
        ("rollout.sampling.temprature", "rollout.sampling.temperature"),
        ("modle", "model"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, key, nearest):
    message = refused(f"{key}=1")
    assert message.startswith(f"{key}=1: unknown key {key!r}; did you mean {nearest!r}?")

    def misspell(values):
        *path, name = key.split(".")
        for part in path:
            values = values.setdefault(part, {})
        values[name] = 1

    path = write(tmp_path, misspell)
    assert refused(path=path) == f"{path}: unknown key {key!r}; did you mean {nearest!r}?"


def test_an_unknown_key_like_no_other_lists_what_there_is():
    assert "known: train, eval" in refused("data.xyzzy=1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=many", "steps: Input should be a valid integer"),
        ("steps=1.5", "steps: Input should be a valid integer"),
        ("kl_coef=[1]", "kl_coef: Input should be a valid number"),
        ("optimizer=3", "optimizer: "),
        ("optimizer=null", "optimizer: "),
        ("data.where=3", "data.where: "),
        ("data.where=[1]", "data.where.0: "),
        ("rollout.thinking=perhaps", "rollout.thinking: "),
        ("steps.more=3", "steps: "),
        ("grader=oracle", "grader: must be policy, frozen, teacher or package.module:name"),
        ("dtype=float16", "dtype: Input should be 'float32' or 'bfloat16'"),
        ("loss.kl_estimator=k4", "loss.kl_estimator: Input should be 'k1', 'k2' or 'k3'"),
    ],
)
def test_a_wrong_type_names_the_key_and_the_value(override, said):
    message = refused(override)
    assert said in message and str(DEMO) in message and ", not " in message


@pytest.mark.parametrize("key", ["model", "steps", "data.train", "rollout.max_new_tokens", "grading"])
def test_a_missing_key_is_named(tmp_path, key):
    def drop(values):
        *path, name = key.split(".")
        for part in path:
            values = values[part]
        del values[name]

    assert f"{key}: Field required" in refused(path=write(tmp_path, drop))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [", ":2: not valid YAML (expected the node content"),
        ("a: \0", ": not valid YAML (unacceptable character"),
        ("- 1\n", ":1: must be a mapping"),
        ("", ":1: must be a mapping"),
        (b"\xff\xfe", ": cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(path=path)
    assert message.startswith(f"{path}{said}") and "\n" not in message


def test_a_path_without_a_file_is_named(tmp_path):
    message = refused(path=tmp_path / "none.yaml")
    assert message.startswith(f"{tmp_path / 'none.yaml'}: no such config file, nor a recipe of the package (")
    assert str(tmp_path) in refused(path=tmp_path)


def test_an_override_must_be_a_key_and_a_yaml_value():
    assert "'steps': an override has the form key=value" in refused("steps")
    assert "'steps=[': the value is not valid YAML" in refused("steps=[")


@pytest.mark.parametrize(
    "override",
    [
        "steps=0",
        "profile=[1, 99]",
        "profile=1",
        "prompts_per_step=0",
        "group_size=1",
        "seed=-1",
        "seed=4294967296",
        "kl_coef=-0.1",
        "rollout.max_new_tokens=0",
        "rollout.max_prompt_tokens=0",
        "rollout.sampling.temperature=0",
        "rollout.sampling.top_k=5",
        "rollout.sampling.top_p=0.9",
        "rollout.sampling.min_p=0.1",
        "grading.max_new_tokens=0",
        "grading.tries=0",
        "grading.sampling.temperature=-1",
        "grading.sampling.top_k=-1",
        "grading.sampling.top_p=0",
        "grading.sampling.min_p=2",
        "loss.clip_low=-0.1",
        "loss.clip_high=-0.1",
        "optimizer.learning_rate=-1",
        "optimizer.warmup_steps=-1",
        "optimizer.weight_decay=-1",
        "optimizer.beta1=1",
        "optimizer.beta2=-0.5",
        "optimizer.grad_clip=0",
        "optimizer.minibatches=0",
        "optimizer.microbatch=0",
        "optimizer.microbatch=5",
        "optimizer.minibatches=3",
        "checkpoint.every=0",
        "checkpoint.keep=0",
        "eval.every=0",
        "eval.rows=0",
        "eval.samples=0",
        "mesh.data=0",
        "mesh.tensor=-1",
    ],
)
def test_a_value_out_of_range_names_its_key(override):
    key = override.partition("=")[0]
    message = refused(override)
    if key.startswith("mesh"):
        assert "yaml: mesh: sizes must be positive" in message  # the room once
    else:
        *room, name = key.split(".")
        assert re.search(rf"\b{name}\b", message) and ".".join(room) in message


def test_a_recipe_made_in_python_is_checked_when_it_is_run(tmp_path):
    config = dataclasses.replace(TrainConfig.load(DEMO, [f"run_dir={tmp_path}"]), steps=0)
    with pytest.raises(InputError, match="^config: steps: Input should be greater than or equal to 1, not 0"):
        train(config)


def test_no_number_of_a_recipe_may_be_infinite_or_nan(tmp_path):
    """Whatever key it has: all that take a fraction, those of a map and those of a teacher too."""
    teacher = {"base_url": "http://x/v1", "model": "m", "cache": "c"}

    def floats(values, path=""):
        for key, value in values.items():
            if isinstance(value, dict) and value:
                yield from floats(value, f"{path}{key}.")
            elif isinstance(value, float) or value is None:
                yield f"{path}{key}"

    keys = [*floats(TrainConfig.load(DEMO, [f"teacher={teacher}"]).to_dict())]
    keys = {*keys, "reward.axis_weights.accuracy", "teacher.parameters.top_p"}
    assert {"kl_coef", "teacher.timeout", "eval.margin", "loss.dual_clip", "grading.memory_gb"} < keys
    for key, value in zip(
        sorted(keys - {"data.teacher", "checkpoint.best"}), itertools.cycle([".inf", ".nan"])
    ):
        message = refused(f"teacher={teacher}", f"{key}={value}")
        assert key.rpartition(".")[2] in message and "\n" not in message
    message = refused("kl_coef=1.e+999")
    assert message == f"{DEMO}: kl_coef: must be a finite number, not inf"


def test_group_sizes_from_two_on_are_accepted():
    assert TrainConfig.load(DEMO, ["group_size=2"]).group_size == 2


@pytest.mark.parametrize("override", ["steps=true", "kl_coef=false", "checkpoint.every=yes", "model=true"])
def test_a_switch_is_not_a_number(override):
    key, _, value = override.partition("=")
    meant = "false" if value == "false" else "true"
    assert f"{key}: not a switch, so it cannot be {meant}" in refused(override)
    assert TrainConfig.load(DEMO, ["rollout.thinking=true"]).rollout.thinking is True


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], ()),
        (["profile=[3, 5]"], (3, 5)),
        (["profile=true"], (2,)),
        (["profile=true", "steps=1"], (1,)),
        (["profile=false"], ()),
    ],
)
def test_which_steps_are_profiled(overrides, steps):
    config = TrainConfig.load(DEMO, overrides)
    assert config.profiled == steps
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_the_best_checkpoint_needs_its_metric():
    assert "checkpoint.best: eval/self is measured on data.eval" in refused(
        "checkpoint.best=eval/self", "data.eval=null"
    )
    assert "checkpoint.best" in refused("checkpoint.best=kl")
