"""Hand-worked agreement, and simple-evals' own figures for equal labels."""

import numpy as np
import pytest

from srrl_jax.evaluation.agreement import Agreement, agreement, grader_pairs, mean, physician_pairs


def test_by_hand():
    # The verdicts "met", "not met" against three and two labels, "met" against one.
    pairs = grader_pairs([True, False, True], [[True, True, False], [True, False], [False]])
    counted = agreement(pairs)
    assert counted == Agreement(both_met=2, only_verdict=2, only_label=1, neither=1)
    assert counted.n == 6
    assert counted.f1_met == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert counted.f1_not_met == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert counted.f1_balanced == pytest.approx((counted.f1_met + counted.f1_not_met) / 2)


def test_what_is_never_said_has_no_f1():
    only_met = agreement([(True, True), (True, True)])
    assert (only_met.f1_met, only_met.f1_not_met, only_met.f1_balanced) == (1.0, None, None)
    assert agreement([(True, False), (False, True)]).f1_balanced == 0.0
    assert agreement([]).f1_balanced is None


def test_unscorable_verdicts_have_no_pairs():
    assert grader_pairs([None, True], [[True, False], [False]]) == [(True, False)]


def test_physicians_against_each_other():
    pairs = physician_pairs([[True, False], [True]], [["p", "q"], ["p"]])
    assert pairs == {"p": [(True, False)], "q": [(False, True)]}


def test_mean_skips_what_is_not_there():
    assert mean([0.5, None, 1.0]) == 0.75
    assert mean([None]) is None


# What simple-evals (compute_metrics_for_rater_by_class) prints for the rows drawn below.
POOLED = (0.6863636363636364, 0.5855855855855856, 0.6359746109746109)
CATEGORIES = {
    "cluster:a": 0.6800167311513123,
    "cluster:b": 0.6161224489795918,
    "cluster:c": 0.6569454634384936,
    "cluster:d": 0.5704347826086957,
}
PHYSICIANS = {
    "p0": 0.6822448979591837,
    "p1": 0.6780632411067193,
    "p2": 0.7543076877917045,
    "p3": 0.7324542124542125,
    "p4": 0.7296489917849142,
    "p5": 0.7037483064880325,
    "p6": 0.6732324279494091,
    "p7": 0.6303030303030304,
    "p8": 0.6607057416267943,
}


@pytest.fixture(scope="module")
def drawn():
    """Verdicts, labels, physicians and categories of 300 rows."""
    rng, rows = np.random.RandomState(7), []  # its stream is frozen
    for i in range(300):
        n, truth = int(rng.randint(1, 5)), rng.rand() < 0.6
        labels = [bool(truth ^ (rng.rand() < 0.2)) for _ in range(n)]
        names = [f"p{j}" for j in rng.choice(9, n, replace=False)]
        rows.append((bool(truth ^ (rng.rand() < 0.3)), labels, names, f"cluster:{'abcd'[i % 4]}"))
    return list(zip(*rows, strict=True))


def test_equal_to_simple_evals(drawn):
    verdicts, labels, names, categories = drawn
    pooled = agreement(grader_pairs(verdicts, labels))
    assert (pooled.f1_met, pooled.f1_not_met, pooled.f1_balanced) == pytest.approx(POOLED, abs=1e-12)
    for category, expected in CATEGORIES.items():
        rows = [i for i, name in enumerate(categories) if name == category]
        part = agreement(grader_pairs([verdicts[i] for i in rows], [labels[i] for i in rows]))
        assert part.f1_balanced == pytest.approx(expected, abs=1e-12)
    each = {name: agreement(p).f1_balanced for name, p in physician_pairs(labels, names).items()}
    assert each == pytest.approx(PHYSICIANS, abs=1e-12)
