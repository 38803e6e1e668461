import json
from pathlib import Path
from random import Random

import srrl_jax.tinyworld
from srrl_jax.rubrics import Example
from srrl_jax.tinyworld.corpus import grader_pairs, pretraining_tree
from srrl_jax.tinyworld.oracle import oracle
from srrl_jax.tinyworld.rows import dump_rows, easy_rows, hard_rows
from srrl_jax.tinyworld.world import facts_of, split_of

FOLDER = Path(srrl_jax.tinyworld.__file__).parent


def combinations(rows):
    return {facts_of(row["prompt"][0]["content"]) for row in rows}


def test_committed_rows_are_what_the_code_writes():
    assert (FOLDER / "easy.jsonl").read_bytes().decode() == dump_rows(easy_rows())
    assert (FOLDER / "hard.jsonl").read_bytes().decode() == dump_rows(hard_rows())


def test_seed_decides():
    assert easy_rows(5, 1) == easy_rows(5, 1) != easy_rows(5, 2)
    assert pretraining_tree(Random(3)) == pretraining_tree(Random(3)) != pretraining_tree(Random(4))
    assert grader_pairs(5, 1) == grader_pairs(5, 1) != grader_pairs(5, 2)


def test_splits_share_no_combination():
    easy, hard = combinations(easy_rows()), combinations(hard_rows())
    rng = Random(0)
    trees = [pretraining_tree(rng) for _ in range(2000)]
    pretraining = {facts_of(tree["prompt"][0]["content"]) for tree in trees}
    assert not easy & hard and not easy & pretraining and not hard & pretraining
    assert {split_of(facts) for facts in easy} == {"easy"}
    assert {split_of(facts) for facts in hard} == {"hard"}
    assert all(len(facts.named()) >= 3 for facts in hard)
    assert len(hard) > 80 and len(easy) > 150


def test_rows_are_healthbench_rows():
    rows = easy_rows() + hard_rows()
    assert len({row["prompt_id"] for row in rows}) == 500
    points = []
    for row in rows:
        example = Example.from_dict(json.loads(json.dumps(row)))
        assert 4 <= len(example.rubrics) <= 8
        assert len({criterion.criterion for criterion in example.rubrics}) == len(example.rubrics)
        assert any(criterion.points > 0 for criterion in example.rubrics)
        assert all(-10 <= criterion.points <= 10 for criterion in example.rubrics)
        points += [criterion.points for criterion in example.rubrics]
    assert 0.25 < sum(point < 0 for point in points) / len(points) < 0.40


def test_pretraining_labels_are_true_and_balanced():
    rng = Random(0)
    labels = []
    for _ in range(500):
        tree = pretraining_tree(rng)
        assert 4 <= len(tree["gradings"]) <= 6
        for criterion, reply in tree["gradings"]:
            verdict = json.loads(reply)
            assert verdict["criteria_met"] is oracle(tree["response"], criterion.criterion)
            assert criterion.points != 0 and -10 <= criterion.points <= 10
            quote = verdict["explanation"].split(" : ")[1]
            assert quote == "nothing ." or quote in tree["response"]
            labels.append(verdict["criteria_met"])
    assert 0.42 < sum(labels) / len(labels) < 0.55


def test_a_topic_alone_does_not_tell_the_label():
    """Criteria of due items are met about as often as not: the grader has to read the answer."""
    rng = Random(1)
    labels = []
    for _ in range(500):
        tree = pretraining_tree(rng)
        due = facts_of(tree["prompt"][0]["content"]).named()
        labels += [
            json.loads(reply)["criteria_met"]
            for criterion, reply in tree["gradings"]
            if "place" in due and "bring" in criterion.criterion
        ]
    assert 0.3 < sum(labels) / len(labels) < 0.7


def test_grader_pairs_are_true_balanced_and_held_out():
    pairs = grader_pairs(200)
    assert sum(truth for *_, truth in pairs) == 100
    for messages, response, criterion, truth in pairs:
        assert oracle(response, criterion.criterion) is truth
        assert split_of(facts_of(messages[0]["content"])) == "hard"
