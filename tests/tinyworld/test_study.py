"""scripts/study.py: its tables, and one seed of each claim that has results."""

import sys
from pathlib import Path

import pytest

from srrl_jax import TrainConfig, train
from srrl_jax.telemetry import read_jsonl
from srrl_jax.tinyworld import easy_rows

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import study

        yield study
        for name in ("study", "claims", "demo", "teacher_share", "outside"):
            sys.modules.pop(name, None)


def test_a_table_has_the_mean_and_its_interval_over_seeds(study, tmp_path):
    assert study.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"  # 4.303 x 1 / sqrt(3)
    assert study.interval([0.5]) == "0.500"
    claim, (readme, out) = study.CLAIMS["e"], (tmp_path / "README.md", tmp_path / "study")
    readme.write_text(f"Kept.\n{study.MARK}Old.")
    out.mkdir()

    times = {"times": {"rollout": 1.0, "grade": 2.0, "update": 1.0}}

    def run(arm: str, seed: int, *truth: float) -> dict:
        curve = [{"steps": 4 * i, "truth": t, "warned": i == 1} for i, t in enumerate(truth)]
        return {
            "base": "weak",
            "keys": [*claim.recipe, *claim.arms[arm]],
            "seed": seed,
            "curve": curve,
        } | times

    rows = [run("no guard", seed, 0.2, 0.35, 0.4 + 0.2 * seed) for seed in (0, 1)]
    rows += [run("KL 0.05", 0, 0.2, 0.3), rows[0] | {"base": "strong"}]
    study.write_tables(out, rows)
    text = readme.read_text()
    assert text.startswith("Kept.") and "Old." not in text
    assert "| before | 2 | 0.200 ± 0.000 |" in text
    assert (
        "| no guard | 2 | 0.500 ± 1.271 | 0.300 ± 1.271 |  | 2 | 0.500 ± 0.000 |" in text
    )  # both were warned
    assert "| KL 0.05 | 1 | 0.300 | 0.100 | -0.100 |" in text
    assert "| stop on warning | 2 | 0.350 ± 0.000 |" in text  # at the second evaluation of "no guard"
    assert "strong base" not in text  # which the claim is not about
    assert (out / "e_weak.png").stat().st_size > 0
    readme.unlink()
    study.write_tables(out, rows)
    assert (out / "tables.md").read_text() == text[text.index("\n\n") + 2 :].replace("(study/", "(")


def test_rubrics_are_changed_as_the_arms_say(study, tmp_path):
    study.write_rows(tmp_path)
    rows = {
        name: read_jsonl(tmp_path / "rows" / f"{name}.jsonl") for name in ("equal", "noisy", "foreign", "few")
    }
    given = easy_rows()
    for i, row in enumerate(given):
        equal, noisy, few = (rows[name][i]["rubrics"] for name in ("equal", "noisy", "few"))
        assert [r["points"] for r in equal] == [5 if r["points"] > 0 else -5 for r in row["rubrics"]]
        assert [r["points"] for r in noisy] == [r["points"] for r in row["rubrics"]]
        assert len(few) == (len(row["rubrics"]) + 1) // 2 and any(r["points"] > 0 for r in few)
        assert all(r in row["rubrics"] for r in few)
    kept = [rows["foreign"][i]["rubrics"][0] == row["rubrics"][0] for i, row in enumerate(given)]
    assert sum(kept) / len(kept) < 0.1
    same = [a == b for row, new in zip(given, rows["noisy"], strict=True)
            for a, b in zip(row["rubrics"], new["rubrics"], strict=True)]  # fmt: skip
    assert 0.66 < sum(same) / len(same) < 0.74


def test_the_arms_of_all_claims_are_recipes(study):
    for claim in study.CLAIMS.values():
        for overrides in claim.arms.values():
            places = {"work": "w", "run": "r", "base": "weak", "endpoint": "http://127.0.0.1:1/v1"}
            keys = [key.format(**places) for key in (*claim.recipe, *overrides)]
            assert TrainConfig.load("configs/demo.yaml", keys).steps
        assert {*claim.bases} <= {*study.BASES}


def gains(start: dict, end: dict) -> bool:
    return end["truth"] > start["truth"] + 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    "claim, base, arm, holds",
    [
        ("a", "strong", "self-reward", gains),
        ("c", "weak", "self-reward", lambda start, end: end["accuracy"] < start["accuracy"] - 0.005),
        ("d", "weak", "20%, both", lambda start, end: end["control"] < 0.1 and end["accuracy"] > 0.7),
        ("e", "weak", "no guard", lambda start, end: end["warned"] and end["accuracy"] < 0.7),
        ("f", "strong", "30% of the criteria replaced", gains),
    ],
    ids="acdef",
)
def test_a_claim_over_one_seed(study, full_compile, claim, base, arm, holds, tmp_path):
    """What the tables of srrl_jax/tinyworld/README.md say, with room for other rounding."""
    keys = (*study.CLAIMS[claim].recipe, *study.CLAIMS[claim].arms[arm])
    curve = study.run_arm(study.recipe(base, keys, 10, tmp_path, tmp_path / "run"))["curve"]
    assert holds(curve[0], curve[-1])


@pytest.mark.slow
def test_an_outside_grader_takes_most_of_a_step(study, full_compile, tmp_path):
    """The times of claim b, over three steps; its score is in the tables alone."""
    claim, few = study.CLAIMS["b"], ("steps=3", "checkpoint.every=3", "data.eval=null")
    keys = (*claim.recipe, *claim.arms["outside, in the process"], *few)
    train(study.recipe("strong", keys, 10, tmp_path, tmp_path / "run"))
    *_, last = read_jsonl(tmp_path / "run" / "timings.jsonl")
    assert last["time/grade"] > 1.5 * last["time/update"]


@pytest.mark.slow
def test_controls_cannot_correct_a_grader_that_judges_by_what_it_writes(study, full_compile, tmp_path):
    """Claim g of the strong base: without writing it is at chance, 0.460 right, and with controls 0.417.

    A base that says yes takes minutes to make; what controls do for that is in the tables alone.
    """
    found = {}
    for way in ("none", "controls"):
        keys = ("grading.verdict=logits", f"grading.calibrate={way}")
        config = study.recipe("strong", keys, 0, tmp_path, tmp_path / "run")
        found[way] = study.base_accuracies(config)["accuracy"]
    assert found["controls"] < found["none"] - 0.01 and found["none"] < 0.55
