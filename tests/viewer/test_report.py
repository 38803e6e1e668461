"""The data in the report's page, and that it trusts no completion; `viewer/test_viewer.py` sees it drawn."""

import json
import re
from html.parser import HTMLParser

import pytest

from srrl_jax.errors import InputError
from srrl_jax.telemetry import RunLog
from srrl_jax.viewer.report import MAX_FOLDED, write_report

METRICS = {
    "reward/mean": 0.4,
    "kl": 0.01,
    "entropy": 1.2,
    "clip_frac/low": 0.001,
    "clip_frac/high": 0.002,
    "grad_norm": 0.7,
    "completions/mean_length": 40.0,
    "completions/truncated": 0.1,
    "grader/unscorable": 0.02,
    "grader/met_rate": 0.6,
    "grader/met_rate_negative": 0.3,
}
TIMES = {"time/rollout": 2.0, "time/grade": 3.0, "time/update": 1.0}  # fmt: skip


class Page(HTMLParser):
    """The tags of a page, its attributes, and the data that it draws."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.attributes = [], []
        self.feed(self.html)
        (text,) = re.findall(r'id="data">(.*?)</script>', self.html, re.DOTALL)
        self.data = json.loads(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def sample(step, reward, response="Certainly.", split="train", **more):
    criteria = [
        {"criterion": "Names a time", "points": 5.0, "verdict": True, "explanation": "It says 18:00.",
         "tries": 1},
        {"criterion": "Invents a service", "points": -8.0, "verdict": None, "explanation": "",
         "tries": 3},
        {"criterion": "Asks back", "points": 3.5, "verdict": False, "explanation": "", "tries": 1},
    ]  # fmt: skip
    row = {
        "step": step, "split": split, "prompt_id": "p1", "sample": 0,
        "prompt": [{"role": "user", "content": "A table for two?"}], "completion": response,
        "response": response, "reward": reward, "advantage": 0.1, "tokens": 12,
        "truncated": False, "criteria": criteria,
    }  # fmt: skip
    return row | more


@pytest.fixture
def run_dir(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 51):
        extra = {"eval/self": 0.3 + step / 100} if step % 10 == 0 else {}
        log.write(step, METRICS | extra, [sample(step, 0.2, f"low {step}"),
                                          sample(step, 0.9, f"high {step}")], TIMES)  # fmt: skip
    (tmp_path / "config.yaml").write_text("model: tiny\nseed: 3\nsteps: 50\ndata: {train: 'easy.jsonl'}\n")
    return tmp_path


def test_whole_report(run_dir):
    table = [{"what": "Grader", "before": None, "after": "n/a"}]
    curves = {"Oracle": [(0, 0.1), (25, None), (50, float("nan"))], "Nothing": []}
    path = write_report(run_dir, curves=curves, table=table, title="A & B")
    assert path == run_dir / "report.html"
    page = Page(path)
    assert "<title>A &amp; B</title>" in page.html and page.data["title"] == "A & B"
    assert page.data["headline"] == table
    facts = {"Model": "tiny", "Training rows": "easy.jsonl", "Seed": "3", "Steps": "50", "Time": "5 min 00 s"}
    assert dict(page.data["facts"]) == facts
    assert page.data["curves"]["outside/Oracle"] == [[0, 0.1]] and page.data["curves"]["kl"][-1] == [50, 0.01]
    assert list(page.data["charts"][0][3])[-3:] == ["eval/own", "outside/Oracle", "outside/Nothing"]
    (training,) = page.data["splits"]
    assert [
        (step["heading"], [row["response"] for _, row in step["shown"]]) for step in training["steps"]
    ] == [
        ("First step (1)", ["high 1", "low 1"]),
        ("Last step (50)", ["high 50", "low 50"]),
    ]
    assert page.data["config"].startswith("model: tiny")


def test_criteria_axes_and_the_samples_on_which_judges_differ(tmp_path):
    rows = [sample(step, 0.5, f"answer {step}") for step in range(1, 14)]
    for step, row in enumerate(rows, start=1):
        for item in row["criteria"]:
            item["tags"] = ["axis:accuracy"]
            item |= {"teacher": item["verdict"], "frozen": item["verdict"]}
        if step > 2:
            row["criteria"][0] |= {"frozen": False, "frozen_explanation": "It says nothing of a time."}
    RunLog(tmp_path).write(1, METRICS, rows)
    data = Page(write_report(tmp_path)).data
    ((step, score),) = data["curves"]["axis/accuracy"]
    assert (step, score) == (1, pytest.approx(5 / 8.5))  # points of readable verdicts
    assert data["judges"] == ["self", "frozen", "teacher"]
    assert [row["criteria"][0]["frozen"] for _, row in data["disagreements"]] == [False] * 10
    (criterion,) = (row for row in data["criteria"] if row["text"] == "Names a time")
    shares = [criterion[name] for name in ("n", "met", "alike", "unscorable", "frozen", "teacher", "length")]
    assert shares == [13, 1, 1, 0, pytest.approx(2 / 13), 1, None]


def test_the_report_links_to_the_viewer_s_export_where_there_is_one(run_dir):
    assert Page(write_report(run_dir)).data["viewer"] == ""
    (run_dir / "view").mkdir()
    (run_dir / "view/index.html").touch()
    assert Page(write_report(run_dir)).data["viewer"] == "view/index.html"


def test_report_asks_nothing_of_the_network(run_dir):
    page = Page(write_report(run_dir))
    assert not {"link", "img", "iframe"} & set(page.tags) and "@import" not in page.html
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    (policy,) = (value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


def test_best_and_worst_come_first_and_the_rest_is_folded(tmp_path):
    rewards = [0.5, None, -0.4, 0.8] + [0.1] * MAX_FOLDED
    RunLog(tmp_path).write(1, {}, [sample(1, r, f"r{r}") for r in rewards])
    (step,) = Page(write_report(tmp_path)).data["splits"][0]["steps"]
    assert [(label, row["reward"]) for label, row in step["shown"]] == [("Best", 0.8), ("Worst", -0.4)]
    assert [row["reward"] for _, row in step["rest"]] == [0.5] + [0.1] * (MAX_FOLDED - 1)
    assert step["left_out"] == 2


def test_completions_cannot_end_the_script_that_holds_them(tmp_path):
    attack = "</script><!--<script>alert(1)</script>\ud83d"
    row = sample(1, 1.0, attack, completion=f"<think>{attack}</think>{attack}")
    row["prompt"][0] = {"role": attack, "content": attack}
    row["criteria"][0] |= {"criterion": attack, "explanation": attack}
    RunLog(tmp_path).write(1, METRICS, [row])
    (tmp_path / "config.yaml").write_text("model: <script>alert(1)</script>\n")
    page = Page(write_report(tmp_path, {attack: [(1, 0.5)]}, [{"what": attack}], title=attack))
    assert page.tags.count("script") == page.html.count("</script") == 2 and "<!--" not in page.html
    assert page.data["splits"][0]["steps"][0]["shown"][0][1]["response"] == attack.replace("\ud83d", "?")


def test_a_run_that_has_logged_nothing(tmp_path):
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert Page(write_report(tmp_path)).data["curves"] == {}
