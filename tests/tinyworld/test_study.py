"""scripts/study.py: its tables, and one seed of each claim that has results."""

import sys
from pathlib import Path

import pytest

from srrl_jax.training import TrainConfig

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import study

        yield study
        for name in ("study", "demo", "teacher_share"):
            sys.modules.pop(name, None)


def test_a_table_has_the_mean_and_its_interval_over_seeds(study, tmp_path):
    assert study.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"  # 4.303 x 1 / sqrt(3)
    assert study.interval([0.5]) == "0.500"
    rows = [
        {
            "claim": "d",
            "arm": arm,
            "seed": seed,
            "curve": [{"steps": 0, "truth": 0.2}, {"steps": 5, "truth": end}],
        }
        for seed in (0, 1)
        for arm, end in {"one": 0.4 + 0.2 * seed, "other": 0.3}.items()
    ]
    study.write_tables(tmp_path, rows)
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert any(line.startswith("| one | 2 | 0.500 ± 1.271 |") for line in lines)
    assert any(line.startswith("| other | 2 | 0.300 ± 0.000 |") for line in lines)
    assert (tmp_path / "d.png").stat().st_size > 0


def test_the_arms_of_all_claims_are_recipes(study):
    for claim in study.CLAIMS.values():
        for overrides in claim.arms.values():
            keys = ["data.teacher=lessons.jsonl", *claim.recipe, *overrides]
            assert TrainConfig.load("configs/demo.yaml", keys).steps
