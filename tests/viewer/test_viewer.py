"""The viewer: what it reads of a growing run, what it answers, and its pages in a real browser."""

import itertools
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import uvicorn

from srrl_jax.errors import InputError
from srrl_jax.evaluation.labels import load_labels
from srrl_jax.telemetry import RunLog, read_jsonl
from srrl_jax.viewer import server
from srrl_jax.viewer.export import export
from srrl_jax.viewer.index import Index, criterion_key
from srrl_jax.viewer.queries import QUERIES
from srrl_jax.viewer.report import write_report

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\ud83d ]]>"
CRITERIA = (
    ("Asks how long it hurts", 5.0, "axis:context"),
    ("Prescribes a drug", -8.0, "axis:accuracy"),
    (f"Is kind {HOSTILE}", 2.0, "axis:context"),
)


def sample(step: int, split: str, prompt: int, number: int) -> dict:
    """Verdicts follow from the place; at step 2 the frozen start disagrees on the first criterion."""
    verdicts = [(step + prompt + number) % 2 == 0, number == 1, None if (step, number) == (1, 0) else True]
    response = f"Answer {number} of prompt {prompt} at step {step}. {HOSTILE}"
    criteria = []
    for (text, points, axis), met in zip(CRITERIA, verdicts, strict=True):
        item = {"criterion": text, "points": points, "tags": [axis], "verdict": met, "probability": 0.75,
                "explanation": f"Because {HOSTILE}", "tries": 1, "tokens": 4.0}  # fmt: skip
        if split == "eval":
            item["frozen"] = not met if step == 2 and points == 5 else met
            item["own"] = item["frozen"]  # a grader of one's own, which says the same
            item["frozen_explanation"] = "The start sees it otherwise."
        criteria.append(item)
    return {
        "split": split, "prompt_id": f"row-{prompt}", "sample": number,
        "example_tags": [f"theme:{'hedging' if prompt else 'urgent'}"],
        "prompt": [{"role": "user", "content": f"Question {prompt}: my knee {HOSTILE}"}],
        "completion": f"<think>let me think {step}</think>{response}", "response": response,
        "reward": (step + 2 * prompt + number) / 10, "advantage": 0.5 if number else -0.5,
        "tokens": 10 * step + number, "truncated": prompt == 1 and number == 1, "criteria": criteria,
    }  # fmt: skip


def write_step(folder: Path, step: int) -> None:
    rows = [sample(step, split, p, n) for split in ("train", "eval") for p in (0, 1) for n in (0, 1)]
    metrics = {"reward/mean": step / 10, "eval/self": step / 10, "kl": 0.01 * step}
    RunLog(folder).write(step, metrics, rows, {"time/rollout": 2.0, "time/update": 1.0})


def make_run(folder: Path, steps: int = 2, kl: float = 0.1) -> Path:
    log = RunLog(folder)
    (folder / "config.yaml").write_text(
        json.dumps({"model": "tiny", "kl_coef": kl, "loss": {"ratio": "token"}})
    )
    for step in range(1, steps + 1):
        write_step(folder, step)
    log.event(2, "warning", f"they part {HOSTILE}")
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


def ask(index: Index, question: str, **params: str) -> dict:
    return QUERIES[question](index, params)


def ids(index: Index) -> list[int]:
    return sorted(row["id"] for row in ask(index, "samples")["rows"])


FILTERS = {
    "step": ("2", lambda row, verdicts: row["step"] == 2),
    "split": ("eval", lambda row, verdicts: row["split"] == "eval"),
    "prompt": ("row-1", lambda row, verdicts: row["prompt_id"] == "row-1"),
    "reward": ("0.2..0.3", lambda row, verdicts: 0.2 <= row["reward"] <= 0.3),
    "tokens": ("..11", lambda row, verdicts: row["tokens"] <= 11),
    "truncated": ("yes", lambda row, verdicts: row["truncated"]),
    "theme": ("hedging", lambda row, verdicts: row["example_tags"] == ["theme:hedging"]),
    "text": ("ANSWER 1 of prompt 0", lambda row, verdicts: "Answer 1 of prompt 0" in row["completion"]),
    "verdict": ("unscorable", lambda row, verdicts: None in verdicts),
}


@pytest.mark.parametrize(
    "names", [*itertools.combinations(FILTERS, 1), ("step", "split"), ("verdict", "split")]
)
def test_a_filter_finds_what_the_rows_say(run, names):
    with Index([run]) as index:
        found = ask(index, "samples", **{name: FILTERS[name][0] for name in names})
    expected = [
        id
        for id, row in enumerate(read_jsonl(run / "samples.jsonl"))
        if all(FILTERS[name][1](row, [c["verdict"] for c in row["criteria"]]) for name in names)
    ]
    assert 0 < len(expected) < 16
    assert sorted(row["id"] for row in found["rows"]) == expected and found["total"] == len(expected)


def test_criterion_axis_and_verdict_are_of_one_and_the_same_criterion(run):
    drug = criterion_key("Prescribes a drug")
    with Index([run]) as index:
        met = ask(index, "samples", criterion=drug, verdict="met")["rows"]
        assert {row["sample"] for row in met} == {1}
        differ = ask(index, "samples", verdict="differ")["rows"]
        assert {(row["step"], row["split"], row["differ"]) for row in differ} == {(2, "eval", 1)}
        assert ask(index, "samples", verdict="differ", axis="accuracy")["rows"] == []
        falling = [row["reward"] for row in ask(index, "samples", sort="-reward")["rows"]]
        assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("params", [{"step": "x"}, {"sort": "text"}, {"verdict": "good"}, {"run": "other"}])
def test_a_link_that_makes_no_sense_is_answered_with_the_reason(run, params):
    with Index([run]) as index, pytest.raises(InputError, match=next(iter(params.values()))):
        ask(index, "samples", **params)


def test_criteria_in_numbers(run):
    with Index([run]) as index:
        rows = {row["text"]: row for row in ask(index, "criteria")["rows"]}
        hurts, drug, kind = (rows[text.encode(errors="replace").decode()] for text, _, _ in CRITERIA)
        assert [hurts[name] for name in ("n", "met", "unscorable", "alike")] == [16, 0.5, 0, 0]
        assert (
            hurts["frozen"] == hurts["own"] == 0.5 and hurts["teacher"] is None
        )  # of the held-out verdicts of both steps
        assert (drug["met"], drug["low"], drug["frozen"]) == (0.5, -8, 1)
        assert kind["unscorable"] == 0.25 and kind["length"] is None  # always met where it could be read
        assert kind["alike"] == 1  # at step 2; at step 1 one verdict of each group is missing
        assert [row["name"] for row in ask(index, "criteria", by="axis")["rows"]] == ["context", "accuracy"]
        assert len(ask(index, "criteria", by="theme", split="eval")["rows"]) == 2
        curve = ask(index, "overview")["curves"]["axis/context"]
        assert curve[0] == (1, pytest.approx((2 * 5 + 2 * 2) / (4 * 5 + 2 * 2)))  # readable verdicts alone


@pytest.mark.parametrize(
    ("line", "said"), [("{broken", "line 17: not JSON"), ('{"step": 1}', "line 17: not a sam")]
)
def test_a_line_that_is_no_sample_is_named(run, line, said):
    with (run / "samples.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=f"samples.jsonl: {said}"), Index([run]):
        pass


def test_the_report_asks_without_what_a_search_takes(run):
    with Index([run], searched=False) as some, Index([run]) as index:
        for by in ("criterion", "axis", "theme"):
            assert ask(some, "criteria", by=by) == ask(index, "criteria", by=by)
        assert ask(some, "samples", text="knee")["total"] == 16  # in the prompts alone
        assert ask(some, "samples", text="answer")["total"] == 0


def test_the_index_follows_a_log_and_a_torn_line_waits(run):
    log = run / "samples.jsonl"
    with Index([run]) as index:
        assert ids(index) == list(range(16))
        version = ask(index, "state")["version"]
        index.refresh()
        assert ask(index, "state")["version"] == version
        write_step(run, 3)
        whole = log.read_bytes()
        log.write_bytes(whole[:-100])
        index.refresh()
        assert len(ids(index)) == 23
        log.write_bytes(whole)
        index.refresh()
        assert len(ids(index)) == 24 and ask(index, "state")["version"] > version


def test_a_resumed_run_that_took_its_log_back_is_read_again(run):
    with Index([run]) as index:
        write_step(run, 3)
        index.refresh()
        RunLog(run).rewind(1)
        write_step(run, 7)
        index.refresh()  # notices
        index.refresh()
        assert {row["step"] for row in ask(index, "samples")["rows"]} == {1, 7}
        assert len(index.ask("FROM verdicts")) == 3 * 16


def test_a_run_in_a_store_is_read_an_object_at_a_time(bucket):
    folder = bucket / "run"
    make_run(folder)
    with Index([folder]) as index:
        assert len(ids(index)) == 16
        write_step(folder, 3)
        index.refresh()
        assert len(ids(index)) == 24
        assert ask(index, "sample", open="23")["row"]["step"] == 3
        RunLog(folder).rewind(2)
        index.refresh()
        index.refresh()
        assert len(ids(index)) == 16


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="give the directory of a run"):
        Index([tmp_path])


# The server


class Served:
    """A server of some runs on loopback, which reads them anew when it is told to."""

    def __init__(self, runs: list[Path], token: str = ""):
        self.index = Index(runs)
        self.index.refresh()
        config = uvicorn.Config(server.make_app(self.index, token), port=0, log_level="error")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.005)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()
        self.index.close()

    def status(self, path: str, body: bytes | None = None, **headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, body, named)) as answer:
                self.headers, self.body = answer.headers, answer.read()
                return answer.status
        except urllib.error.HTTPError as error:
            self.headers, self.body = error.headers, error.read()
            return error.code


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    serving = Served([make_run(folder / "one"), make_run(folder / "two", steps=1, kl=0.0)])
    yield serving
    serving.close()


def test_the_server_takes_nothing_from_other_sites(served):
    assert served.status("") == 200
    policy = served.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert served.status("api/state", host="evil.example") == 400  # DNS rebinding
    mark = json.dumps({"run": "one", "id": 0, "k": 0, "label": True}).encode()
    assert served.status("api/label", mark, content_type="text/plain") == 415  # a form of another page
    assert served.status("api/samples?step=x") == 400 and b"step: x must be a number" in served.body
    assert served.status("api/nothing") == 404
    assert served.status("../index.py") == 404


def test_away_from_loopback_a_token_is_asked_for(run):
    serving = Served([run], token="secret")
    try:
        assert serving.status("api/state") == 403
        assert serving.status("api/state?token=guess") == 403
        assert serving.status("api/state", cookie="token=secret") == 200
        assert serving.status("?token=secret", cookie="token=secret") == 200  # by way of a redirect
    finally:
        serving.close()


# The pages


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium. CI must have it."""
    required = os.environ.get("CI") == "true"
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None and not required:
        pytest.skip("needs chromium (apt-get install chromium)")
    if not required:
        pytest.importorskip("playwright", reason="needs the extra `test` (playwright)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A page that fails the test where a script failed or the policy was broken."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    opened, faults = context.new_page(), []
    opened.set_default_timeout(5000)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    yield opened
    context.close()
    assert faults == []


def show(page, url: str, wanted: str) -> None:
    """Goes to a link and waits until it is drawn."""
    page.goto(f"{url}#{wanted}")
    page.wait_for_selector(f'main[data-drawn="#{wanted}"]')


def rows_of(page) -> list[str]:
    return page.locator("tbody tr").all_inner_texts()


def test_filtering_opening_and_the_address_that_names_it(page, served):
    show(page, served.url, "samples")
    assert page.locator("tbody tr").count() == 16
    page.select_option("#f-split", "eval")
    page.wait_for_selector('main[data-drawn="#samples?split=eval"]')
    page.fill("#f-text", "answer 1 of prompt 0")
    page.press("#f-text", "Enter")
    page.wait_for_selector('main[data-drawn$="text=answer+1+of+prompt+0"]')
    assert page.locator("tbody tr").count() == 2
    page.locator("tbody tr").first.click()
    page.wait_for_selector("#detail")
    seen = page.inner_text("#detail")
    assert "Step 2, eval, sample 1" in seen and "judges" not in seen
    assert page.locator("#detail .criteria li").count() == 3
    first = page.locator("#detail .criteria li").first.inner_text()
    assert "+5" in first and "not met" in first and "frozen met" in first and "The start sees it" in first
    assert page.locator("#detail summary").inner_text() == "Thought"
    page.locator("#detail summary").click()
    assert "let me think 2" in page.inner_text("#detail details")
    address = page.url
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="detached")
    page.goto(address)
    page.wait_for_selector("#detail")
    assert page.inner_text("#detail") != ""
    assert page.input_value("#f-text") == "answer 1 of prompt 0"


def test_two_of_a_group_side_by_side_and_a_prompt_over_the_steps(page, served):
    show(page, served.url, "samples?split=train&open=8")
    page.select_option("#f-beside", label="#1, 0.30")
    page.wait_for_selector(".pair .answer:nth-child(2)")
    assert "beside=9" in page.url
    texts = page.locator(".pair .answer").all_inner_texts()
    assert "advantage −0.50" in texts[0] and "advantage +0.50" in texts[1]
    history = page.locator(".history li").all_inner_texts()
    assert [line.split("\n")[0] for line in history] == ["step 1", "step 2"]
    assert "Answer 0 of prompt 0 at step 1" in history[0]
    page.keyboard.press("j")  # newest first: the next one in the list is one older
    page.wait_for_selector('main[data-drawn="#samples?split=train&open=3"]')


def test_hostile_text_is_shown_and_never_runs(page, served):
    for view in ("overview", "samples?open=3&beside=2", "criteria", "compare", "label"):
        show(page, served.url, view)
        assert page.locator("main img, main script").count() == 0
        assert "<img src=x" in page.inner_text("main")
        assert page.title() != "owned"


def test_criteria_sort_and_lead_to_their_samples(page, served):
    show(page, served.url, "criteria")
    assert len(rows_of(page)) == 3
    page.get_by_role("link", name="points").click()
    page.wait_for_selector('main[data-drawn="#criteria?sort=-low"]')
    assert "Prescribes a drug" in rows_of(page)[-1] and "−8" in rows_of(page)[-1]
    page.get_by_role("link", name="Prescribes a drug").click()
    page.wait_for_selector(f'main[data-drawn="#samples?criterion={criterion_key("Prescribes a drug")}"]')
    assert page.locator("tbody tr").count() == 16
    assert page.locator(".filters .chip").inner_text() == "× Prescribes a drug"


def test_runs_are_compared_on_the_prompts_they_share(page, served):
    show(page, served.url, "compare")
    assert page.locator("figure").count() == 3  # reward, held-out, KL: what both have logged
    assert "held-out, step 1" in page.inner_text("main")
    assert [row.split("\t")[1:] for row in rows_of(page)] == [["0.15", "0.15", "0"], ["0.35", "0.35", "0"]]
    show(page, served.url, "overview?other=two")
    differing = page.locator("details tbody tr").all_inner_texts()
    assert [row.split() for row in differing] == [["kl_coef", "0.1", "0.0"]]


def test_labels_go_to_a_file_that_meta_evaluate_reads_and_score_the_judges(page, served):
    file = served.index.runs[0].folder / "labels.jsonl"
    show(page, served.url, "label?split=eval")
    assert "The judge says" in page.inner_text("main")  # first where judges differ: step 2, criterion 1
    assert "Step 2, eval" in page.inner_text("main")
    for key, count in (("y", 1), ("n", 2), ("u", 2), ("y", 3)):
        before = page.url
        page.keyboard.press(key)
        page.wait_for_url(lambda url, before=before: url != before)
        page.wait_for_selector(f'main[data-drawn="#{page.url.partition("#")[2]}"]')
        assert f"{count} marked in labels.jsonl" in page.inner_text("main")
    rows = load_labels(file)
    assert len(rows) == 3 and {row.criterion.criterion for row in rows} == {"Asks how long it hurts"}
    *_, unsure, _ = every = read_jsonl(file)
    assert len(every) == 4 and unsure["label"] is None  # which comes no more
    saved = [row for row in every if row is not unsure]
    right = [row["label"] == row["judges"]["self"] for row in saved]
    assert right == [True, False, True]
    table = {line.split()[0]: line.split()[-1] for line in page.locator(".score tbody tr").all_inner_texts()}
    assert table == {"self": "3", "frozen": "3", "own": "3"}
    for label, count in ((True, 4), (False, 4), (None, 3)):  # again, the other way, and taken away
        body = json.dumps({"run": "one", "id": 8, "k": 1, "label": label}).encode()
        assert served.status("api/label", body, content_type="application/json") == 200
        assert len(load_labels(file)) == count
    assert served.status("api/label", body.replace(b"null", b"1"), content_type="application/json") == 400


def test_the_page_grows_with_the_run(page, run):
    serving = Served([run])
    try:
        show(page, serving.url, "samples?open=1")
        page.locator("summary").click()
        write_step(run, 3)
        serving.index.refresh()
        page.wait_for_selector("tbody tr:nth-child(24)")
        assert page.locator("details").get_attribute("open") is not None  # nor does it shut what is read
        assert rows_of(page)[0].startswith("3") and "24 samples" in page.inner_text("#status")
    finally:
        serving.close()


def test_exported_files_answer_like_the_server(page, run, tmp_path):
    with Index([run]) as index:
        opened = export(index, str(tmp_path / "out"))
        expected = {name: sorted(row["id"] for row in ask(index, "samples", **{name: value})["rows"])
                    for name, (value, _) in FILTERS.items()}  # fmt: skip
        expected["axis"] = sorted(row["id"] for row in ask(index, "samples", axis="context")["rows"])
    for name, found in expected.items():
        value = FILTERS[name][0] if name in FILTERS else "context"
        page.goto(f"{opened.as_uri()}#samples?{name}={value}&sort=tokens")
        page.wait_for_selector(f'main[data-drawn^="#samples?{name}="]')
        links = page.locator("tbody tr").evaluate_all("rows => rows.map((row) => row.dataset.open)")
        assert sorted(int(link.rpartition("open=")[2]) for link in links) == found
    show(page, opened.as_uri(), "samples?open=13")
    assert "Step 2, eval, sample 1" in page.inner_text("#detail")
    for view, text in (("overview", "Self-given reward"), ("criteria", "Prescribes a drug"),
                       ("compare", "One run is here"), ("label", "run srrl view RUN")):  # fmt: skip
        show(page, opened.as_uri(), view)
        assert text in page.inner_text("main")


def test_the_report_is_drawn_with_its_policy_and_no_text_of_a_run_is_markup(page, run):
    log = RunLog(run)
    (run / "view").mkdir()
    (run / "view/index.html").touch()
    for step in range(3, 50):
        log.write(step, {"reward/mean": step / 100}, timings={"time/rollout": 2.0})
    log.write(50, {"reward/mean": 0.5}, timings={"time/rollout": 90.0})
    report = write_report(
        run, {f"Oracle {HOSTILE}": [(1, 0.25)]}, [{"what": HOSTILE, "before": 1.0, "after": 3}]
    )
    page.goto(report.as_uri())
    charts = page.locator("figure h3").all_inner_texts()
    assert charts == ["Reward", "Distance", "Score by axis", "Seconds"]  # what was logged
    seen = page.inner_text("main")
    for text in (
        "they part",
        "+2",
        "Criteria to repair first",
        "The start sees it otherwise.",
        "points, −8 in penalties",
    ):
        assert text in seen
    assert "Of each phase of a step. The most, 90, is cut off." in seen
    assert page.get_by_role("link").all_inner_texts() == ["view/index.html"]
    assert page.locator("main img, main script").count() == 0 and page.title() != "owned"
    assert page.locator("figure .legend li").all_inner_texts()[2].startswith("Oracle <img src=x")
    page.locator("summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
