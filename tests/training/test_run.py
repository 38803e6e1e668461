"""What may change when a run goes on, and what a refused run leaves behind."""

import json
import shutil
from pathlib import Path

import jax
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError
from srrl_jax.parallel import make_mesh
from srrl_jax.run import train
from srrl_jax.run.checks import check_identity, check_run, write_config
from srrl_jax.training.learner import Learner, build_model
from srrl_jax.training.tasks import load_tasks

from .conftest import WORLD


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


def test_a_key_that_the_run_is_older_than_has_its_default(recipe, begun):
    path = begun / "config.yaml"
    old = yaml.safe_load(path.read_text())
    del old["matmul_precision"], old["rollout"]["int8"]
    path.write_text(yaml.safe_dump(old))
    assert check_run(recipe(begun, "steps=4")) == []
    with pytest.raises(InputError, match="matmul_precision was 'highest', now 'default'"):
        check_run(recipe(begun, "steps=4", "matmul_precision=default"))
    path.write_text(yaml.safe_dump(old | {"of_old": 3}))
    with pytest.raises(InputError, match="of_old was 3, now None"):
        check_run(recipe(begun, "steps=4"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: x\nsteps: [1\n", "config.yaml:3: not valid YAML"),
        ("", "config.yaml:1: must be a mapping"),
        ("steps: many\n", "config.yaml: model: Field required|config.yaml: run_dir: Field required"),
    ],
)
def test_a_broken_config_of_a_run_is_told_in_one_line(recipe, begun, text, said):
    (begun / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=said) as error:
        check_run(recipe(begun, "steps=4"))
    assert "another run_dir" in str(error.value) and "\n" not in str(error.value)


def test_a_run_that_has_lost_its_checkpoints_does_not_lose_its_logs(recipe, tmp_path):
    config = recipe(tmp_path, "checkpoint.every=2")
    write_config(config)
    lines = [json.dumps({"step": step}) + "\n" for step in range(6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:5]))  # the first could not be written
    assert check_run(config) == []
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match="has logs of 5 steps, but no checkpoint"):
        check_run(config)


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


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def one_tensor_larger(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, path, metadata={"format": "pt"})


def test_each_of_the_files_that_results_depend_on_is_told_apart(recipe, tmp_path):
    model, files = tmp_path / "model", tmp_path / "files"
    shutil.copytree(WORLD / "checkpoint", model)
    files.mkdir()
    for name in ("easy.jsonl", "hard.jsonl", "grader.txt"):
        shutil.copy(WORLD / name, files)
    row = json.loads((WORLD / "easy.jsonl").read_text().splitlines()[0])
    verdicts = [{"criterion": c["criterion"], "points": 1, "met": True} for c in row["rubrics"][:1]]
    lesson = {
        "prompt": row["prompt"],
        "rubrics": row["rubrics"][:1],
        "response": "hello .",
        "verdicts": verdicts,
    }
    (files / "lessons.jsonl").write_text(json.dumps(lesson) + "\n")
    config = recipe(
        tmp_path / "run",
        f"model={model}",
        f"data.train={files / 'easy.jsonl'}",
        f"data.eval={files / 'hard.jsonl'}",
        f"data.teacher={files / 'lessons.jsonl'}",
        f"grading.template={files / 'grader.txt'}",
    )

    def identity() -> dict[str, str]:
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            weights = Learner(build_model(config), config, mesh, longest_prompt=36).fingerprint()
        return load_tasks(config, load_tokenizer(config.model)).identity | {"weights": weights}

    before = identity()
    assert identity() == before
    for name, file, change in (
        ("rows", files / "easy.jsonl", ('"points": ', '"points": 1')),
        ("held_out_rows", files / "hard.jsonl", ('"points": ', '"points": 1')),
        ("lessons", files / "lessons.jsonl", ('"met": true', '"met": false')),
        ("grader_template", files / "grader.txt", ("{criterion}", "{criterion} ?")),
        ("chat_template", model / "tokenizer_config.json", ("{%", "{#- another -#}{%")),
        ("weights", model / "model.safetensors", one_tensor_larger),
    ):
        kept = file.read_bytes()
        change(file) if callable(change) else edited(file, *change)
        after = identity()
        assert {key for key in before if before[key] != after[key]} == {name}
        file.write_bytes(kept)


@pytest.mark.parametrize("name", ["rows", "tokenizer", "weights"])
def test_a_run_does_not_go_on_with_other_things_than_it_began_with(recipe, tmp_path, name):
    write_config(recipe(tmp_path), {name: "what it was"})
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(InputError, match=f"began with other {name} .*checkpoint.accept_changes=.{name}"):
        train(recipe(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml"]


def test_a_key_accepts_what_changed_and_the_log_tells_of_it(recipe, begun):
    write_config(recipe(begun, "steps=4"), {"rows": "a", "weights": "b"})
    now = {"rows": "c", "weights": "b", "tokenizer": "new in this version"}
    config = recipe(begun, "steps=4", "checkpoint.accept_changes=[rows]")
    assert check_identity(config, now) == ["rows changed, by checkpoint.accept_changes"]
    with pytest.raises(InputError, match=r"accept_changes=\[rows,weights\]"):
        check_identity(config, now | {"weights": "c"})
    assert check_run(config) == ["checkpoint.accept_changes was [], now ['rows']"]


def test_a_weight_of_an_axis_that_no_row_has_is_refused(recipe, tmp_path):
    config = recipe(tmp_path, "reward.axis_weights={acuracy: 2}")
    with pytest.raises(InputError, match="axis_weights.acuracy: no criterion .* the axes are accuracy, comm"):
        load_tasks(config, load_tokenizer(config.model))
