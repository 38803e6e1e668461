"""The report: what it shows, what it leaves out, and that it trusts no completion."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import matplotlib
import pytest

from srrl_jax.errors import InputError
from srrl_jax.telemetry import RunLog
from srrl_jax.telemetry.report import MAX_FOLDED, write_report

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
CHARTS = ["Reward", "Distance and diversity", "Completions", "Grader", "Updates", "Time"]
VOID = {"meta", "br", "link", "img", "path", "use", "rect"}


class Page(HTMLParser):
    """Collects headings and attributes, and fails on tags that do not nest."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.open, self.headings = [], [], [], []
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h3":
            self.headings.append(data)


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
    path = write_report(
        run_dir,
        curves={"Oracle <b> $x_1$": [(0, 0.1), (50, 0.6)], "Nothing": []},
        table=[{"what": "Hard oracle score", "before": 0.31, "after": 0.62},
               {"what": "Grader", "before": None, "after": "n/a"}],
        title="A & B",
    )  # fmt: skip
    assert path == run_dir / "report.html"
    page = Page(path)
    assert page.headings == CHARTS
    assert page.html.count("<svg") == len(CHARTS)
    assert "A &amp; B" in page.html
    assert "Oracle &lt;b&gt; $x_1$ <b>0.60</b>" in page.html
    for fact in ("tiny", "easy.jsonl", "5 min 00 s"):
        assert f"<dd>{fact}</dd>" in page.html
    assert "<td>0.31</td>" in page.html and "+0.31" in page.html
    samples = ("low 1", "high 1", "low 50", "high 50")
    for text in (*samples, "It says 18:00.", "unscorable", "+5", "−8"):
        assert f">{text}<" in page.html
    assert ">low 25<" not in page.html
    assert ">5 of 8.5 points<" in page.html


def test_criteria_axes_and_the_samples_on_which_judges_differ(tmp_path):
    rows = [sample(step, 0.5, f"answer {step}") for step in range(1, 14)]
    for step, row in enumerate(rows, start=1):
        for item in row["criteria"]:
            item["tags"] = ["axis:accuracy"]
            item |= {"teacher": item["verdict"], "frozen": item["verdict"]}
        if step > 2:
            row["criteria"][0] |= {"frozen": False, "frozen_explanation": "It says nothing of a time."}
    RunLog(tmp_path).write(1, METRICS, rows)
    page = Page(write_report(tmp_path))
    assert page.headings == [*CHARTS[:-1], "Score by axis"]
    assert "accuracy: 0.59 at step 1" in page.html  # 5 of 8.5 points of readable verdicts
    differing = page.html[
        page.html.index(">Where judges differ most<") : page.html.index(">Training samples<")
    ]
    assert differing.count("<b>frozen: not met</b> It says nothing of a time.") == 10
    (criterion,) = re.findall(r">Names a time</div></th>(.*?)</tr>", page.html, re.DOTALL)
    assert re.findall("<td>(.*?)</td>", criterion) == ["13", "100%", "100%", "0%", "15%", "100%", "–"]


def test_the_report_links_to_the_viewer_s_export_where_there_is_one(run_dir):
    assert "view/index.html" not in Page(write_report(run_dir)).html
    (run_dir / "view").mkdir()
    (run_dir / "view/index.html").touch()
    assert '<a href="view/index.html">' in Page(write_report(run_dir)).html


def test_report_asks_nothing_of_the_network_and_ids_are_unique(run_dir):
    page = Page(write_report(run_dir))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "http" not in page.html and "@import" not in page.html
    for name, value in page.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#")
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_best_and_worst_come_first_and_the_rest_is_folded(tmp_path):
    rewards = [0.5, None, -0.4, 0.8] + [0.1] * MAX_FOLDED
    rows = [sample(1, r, f"r{r}") for r in rewards]
    RunLog(tmp_path).write(1, {}, rows)
    html = Page(write_report(tmp_path)).html
    places = [html.index(mark) for mark in (">r0.8<", ">r-0.4<", "<summary>", ">r0.5<")]
    assert places == sorted(places)
    assert f"{MAX_FOLDED} more of this step; another 2 are in samples.jsonl" in html


def test_completions_are_text_not_markup(tmp_path):
    attack = "<script>alert(1)</script>\ud83d"
    row = sample(1, 1.0, attack, completion=f"<think>{attack}</think>{attack}")
    row["prompt"][0] = {"role": attack, "content": attack}
    row["criteria"][0] |= {"criterion": attack, "explanation": attack}
    RunLog(tmp_path).write(1, METRICS, [row])
    (tmp_path / "config.yaml").write_text("model: <script>alert(1)</script>\n")
    page = Page(write_report(tmp_path, {attack: [(1, 0.5)]}, [{"what": attack}], title=attack))
    assert "script" not in page.tags
    assert page.html.count("&lt;script&gt;alert(1)") >= 10


@pytest.mark.parametrize("missing, left", [
    (["kl", "entropy"], [c for c in CHARTS if c != "Distance and diversity"]),
    (["kl"], CHARTS),
    (list(TIMES), CHARTS[:-1]),
    ([*METRICS, *TIMES], []),
])  # fmt: skip
def test_charts_without_metrics_are_left_out(tmp_path, missing, left):
    metrics, times = (
        {key: None if key in missing else value for key, value in given.items()} for given in (METRICS, TIMES)
    )
    RunLog(tmp_path).write(1, metrics, timings=times)
    assert Page(write_report(tmp_path)).headings == left


def test_a_run_that_has_logged_nothing(tmp_path):
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert "No step has been logged yet" in Page(write_report(tmp_path)).html


def test_charts_are_well_formed_draw_the_data_and_leave_matplotlib_alone():
    from srrl_jax.telemetry.charts import SERIES, Panel, Series, line_chart, stacked_chart

    before = dict(matplotlib.rcParams)
    line = Series("reward", [(step, step / 100) for step in range(101)], colour=1)
    svg = line_chart([Panel("score", [line], fraction=True)], 500, 300)
    slow = Series("rollout", [(1, 90.0)] + [(step, 2.0) for step in range(2, 60)])
    stacked, remark = stacked_chart([slow], 500, 300)
    assert dict(matplotlib.rcParams) == before
    for picture, colour in ((svg, 1), (stacked, 0)):
        ET.fromstring(picture.replace("xlink:href", "href"))
        assert f"var(--series-{colour}, {SERIES[colour]})" in picture
    assert remark == "Step 1 took 90 s and is cut off."
    assert stacked_chart([Series("rollout", [(1, 2.0)])], 500, 300)[1] == ""
    assert svg == line_chart([Panel("score", [line], fraction=True)], 500, 300)
