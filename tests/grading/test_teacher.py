"""A teacher over real HTTP on loopback, by an endpoint that misbehaves in every way."""

import json
import time
from pathlib import Path

import pytest

from srrl_jax.errors import InputError
from srrl_jax.grading import GradingItem, Teacher, TeacherConfig, Verdict
from srrl_jax.rubrics import Criterion

YES, NO = json.dumps({"criteria_met": True}), json.dumps({"explanation": "why", "criteria_met": False})
KEY = "sk-very-secret-0123456789"
HTML = b"<!doctype html><html><body>Bad gateway</body></html>"
ERROR = json.dumps({"error": {"message": "overloaded", "code": 529}}).encode()


def item(*names: str, response: str = "an answer", points: float = 5.0) -> GradingItem:
    return GradingItem([{"role": "user", "content": "hi"}], response, [Criterion(n, points) for n in names])


@pytest.fixture
def teacher(chat_server, tmp_path):
    """Makes teachers of the server that share a cache; closes them."""
    opened = []

    def make(**config) -> Teacher:
        given = {
            "base_url": chat_server.url,
            "model": "judge-1",
            "cache": str(tmp_path / "cache.sqlite"),
            "key_env": "TEACHER_KEY",
            "backoff": 0.001,
            "timeout": 5.0,
            "retries": 2,
        }
        opened.append(Teacher(TeacherConfig(**given | config)))
        return opened[-1]

    yield make
    for one in opened:
        one.__exit__()


def met(rows: list[list[Verdict]]) -> list[list[bool | None]]:
    return [[verdict.met for verdict in row] for row in rows]


def by_criterion(**replies):
    """Says `replies[c]` for the criterion c, each of a list in turn."""
    left = {name: iter(said if isinstance(said, list) else [said] * 99) for name, said in replies.items()}

    def say(prompt, count):
        (name,) = [name for name in left if f"] {name}\n" in prompt]
        said = next(left[name])
        return said() if callable(said) else said

    return say


def test_every_criterion_is_one_request_of_the_whole_prompt(chat_server, teacher):
    chat_server.say = by_criterion(a=YES, b=NO, c=f"```json\n{YES}\n```")
    told = []
    config = {"parameters": {"temperature": 0.5, "max_tokens": 99}, "price_in": 1e6, "price_out": 2e6}
    one = teacher(**config)
    rows = one.grade([item("a", "b"), item("c", response="other")], lambda *wave: told.append(wave))
    assert met(rows) == [[True, False], [True]]
    assert rows[0][1] == Verdict(False, "why", 1, len(NO.split()), 0.0, votes=[False])
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert chat_server.headers["Authorization"] == f"Bearer {KEY}"
    for body in chat_server.requests:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.5, 99)
        (message,) = body["messages"]
        assert message["role"] == "user" and "user: hi" in message["content"]
    prompts = sum(len(body["messages"][0]["content"].split()) for body in chat_server.requests)
    said = len(YES.split()) + len(NO.split()) + len(YES.split()) + 2
    assert one.usage == (3, prompts, said, 0, prompts + 2 * said)


def test_a_system_message_comes_first_and_decides_the_reply(chat_server, teacher):
    teacher().grade([item("a")])
    teacher(system="Be kind.").grade([item("a")])
    (plain,), (system, user) = (body["messages"] for body in chat_server.requests)
    assert system == {"role": "system", "content": "Be kind."} and user == plain
    assert "system" in teacher().settings


def test_nothing_is_paid_twice(chat_server, teacher):
    items = [item("a", "b"), item("a", "b"), item("a", response="other")]
    first = teacher().grade(items)
    assert len(chat_server.requests) == 3  # the second item repeats the first, within one call
    chat_server.say = lambda prompt, count: NO  # and changes its mind
    again = teacher(concurrency=1, retries=0)
    assert again.grade(items) == first and len(chat_server.requests) == 3
    assert again.usage == (0, 0, 0, 5, 0.0)
    for other in ({"model": "judge-2"}, {"parameters": {"temperature": 1}}, {"template": "healthbench"}):
        assert met(teacher(**other).grade(items[2:])) == [[False]]
    assert len(chat_server.requests) == 6


@pytest.mark.parametrize(
    "fault",
    [
        (0,),
        (500, b"oops"),
        (503, HTML),
        (429, b"slow down"),
        (200, HTML),
        (200, ERROR),
        (200, b'{"choices": []}'),
        (200, b'{"choices": [{"message": {"content": ["a list"]}}]}'),
        (200, b"[" * 100_000),
        (200, b""),
    ],
    ids=lambda fault: f"{fault[0]} {fault[1][:20] if fault[1:] else 'dropped'}",
)
def test_a_passing_fault_is_tried_again(chat_server, teacher, fault):
    chat_server.say = by_criterion(a=[chat_server.raw(*fault), chat_server.raw(*fault), YES])
    ((verdict,),) = teacher().grade([item("a")])
    assert (verdict.met, verdict.tries) == (True, 1)
    assert len(chat_server.requests) == 3


def test_an_endpoint_that_hangs_is_left_at_the_deadline(chat_server, teacher):
    chat_server.say = by_criterion(a=[chat_server.hang, YES], b=YES)
    start = time.monotonic()
    assert met(teacher(timeout=0.3).grade([item("a", "b")])) == [[True, True]]
    assert time.monotonic() - start < 5


def test_retry_after_is_heeded(chat_server, teacher):
    busy = chat_server.raw(429, b"", (("Retry-After", "0.4"),))
    chat_server.say = by_criterion(a=[busy, YES])
    start = time.monotonic()
    teacher().grade([item("a")])
    assert 0.4 <= time.monotonic() - start < 5


def test_unreadable_replies_are_drawn_anew_within_bounds_then_unscorable(chat_server, teacher):
    chat_server.say = by_criterion(a=["hm", "hm", YES], b="hm", c=f"{YES} or rather {NO}")
    rows = teacher(tries=3).grade([item("a", "b", "c")])
    assert [(v.met, v.tries) for v in rows[0]] == [(True, 3), (None, 3), (None, 3)]
    assert len(chat_server.requests) == 9
    assert teacher(tries=3).grade([item("a", "b", "c")]) == rows  # unreadable replies were paid too
    assert len(chat_server.requests) == 9


def test_the_majority_of_several_votes_counts(chat_server, teacher):
    chat_server.say = by_criterion(a=[YES, NO, YES], b=[NO, "hm", YES, "hm", NO, NO])
    (a, b) = teacher(votes=3, tries=2, concurrency=1).grade([item("a", "b")])[0]
    assert (a.met, a.tries, a.probability) == (True, 1, pytest.approx(2 / 3))
    assert (b.met, b.tries, b.probability) == (False, 2, pytest.approx(1 / 4))
    assert (a.logged, b.logged) == ({"votes": [True, False, True]}, {"votes": [False, True, False, False]})


def test_all_criteria_in_one_query(chat_server, teacher):
    chat_server.say = lambda prompt, count: json.dumps(
        [{"criterion": 1, "criteria_met": True}, {"criterion": 2, "criteria_met": False}]
    )
    assert met(teacher(together=True).grade([item("a", "b")])) == [[True, False]]
    assert len(chat_server.requests) == 1


def test_never_more_than_so_many_at_one_time(chat_server, teacher):
    def slow(prompt, count):
        time.sleep(0.02)
        return YES

    chat_server.say = slow
    teacher(concurrency=3).grade([item("a", response=str(i)) for i in range(12)])
    assert 1 < chat_server.most <= 3


@pytest.mark.parametrize("limit", [{"requests_per_minute": 60}, {"tokens_per_minute": 60 * 10_300}])
def test_a_rate_holds_over_calls(chat_server, teacher, limit):
    one = teacher(**limit, parameters={"max_tokens": 10_000})  # and nearly 300 of the prompt
    start = time.monotonic()
    for part in range(2):  # 60 at once, then one a second
        one.grade([item("a", response=f"{part} {i}") for i in range(30 + part)])
    assert 0.5 < time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the key in TEACHER_KEY is refused: HTTP 401"),
        (403, "TEACHER_KEY"),
        (404, "HTTP 404.*mend base_url"),
    ],
)
def test_what_no_retry_mends_stops_at_once(chat_server, teacher, status, message):
    body = f"Incorrect API key provided: {KEY}".encode()
    chat_server.say = lambda prompt, count: chat_server.raw(status, body)
    with pytest.raises(InputError, match=message) as caught:
        teacher(concurrency=1).grade([item("a", "b")])
    assert len(chat_server.requests) == 1
    assert KEY not in str(caught.value) and caught.value.__cause__ is None


def test_a_wrong_path_or_parameter_is_told_by_its_first_replies(chat_server, teacher):
    with pytest.raises(InputError, match="HTTP 404"):
        teacher(base_url=chat_server.url.removesuffix("/v1")).grade([item("a")])
    chat_server.say = lambda prompt, count: chat_server.raw(200, HTML)
    with pytest.raises(InputError, match="no completion in HTTP 200: <!doctype html>.*check base_url"):
        teacher().grade([item("a")])
    chat_server.requests.clear()
    chat_server.say = lambda prompt, count: chat_server.raw(400, b"no such parameter")
    with pytest.raises(InputError, match="no such parameter; mend model or parameters"):
        teacher(concurrency=2).grade([item(*"abcdefgh")])
    assert len(chat_server.requests) <= 4


def test_one_prompt_that_the_endpoint_refuses_is_unscorable(chat_server, teacher):
    too_long, page = chat_server.raw(400, b"too long"), chat_server.raw(200, HTML)
    chat_server.say = by_criterion(a=too_long, b=YES, c=page)
    rows = teacher(tries=2).grade([item("a", "b", "c")])
    assert met(rows) == [[None, True, None]]
    chat_server.say = by_criterion(a=NO, b=NO, c=NO)  # faults are not kept, replies are
    assert met(teacher(tries=2).grade([item("a", "b", "c")])) == [[False, True, False]]


def test_an_endpoint_that_dies_midway_keeps_what_it_said(chat_server, teacher):
    items = [item("a", response=str(i)) for i in range(10)]
    chat_server.say = lambda prompt, count: YES if count < 6 else chat_server.raw(0)
    with pytest.raises(InputError, match="3 attempts failed: .*kept in .*cache.sqlite: run the same command"):
        teacher(concurrency=1).grade(items)
    assert len(chat_server.requests) == 6 + 3
    chat_server.requests.clear()
    chat_server.say = lambda prompt, count: YES
    assert met(teacher().grade(items)) == [[True]] * 10
    assert len(chat_server.requests) == 4


def test_what_is_on_its_way_when_another_fails_is_kept(chat_server, teacher):
    def late():
        time.sleep(0.5)
        return YES

    chat_server.say = by_criterion(slow=late, broken=chat_server.raw(0))
    with pytest.raises(InputError, match="3 attempts failed"):
        teacher().grade([item("slow", "broken")])
    chat_server.requests.clear()
    chat_server.say = by_criterion(slow=YES, broken=YES)
    assert met(teacher().grade([item("slow", "broken")])) == [[True, True]]
    assert len(chat_server.requests) == 1


def test_the_key_lands_nowhere(chat_server, teacher, tmp_path, capfd, caplog):
    said = json.dumps({"explanation": f"your key is {KEY}", "criteria_met": True})
    chat_server.say = lambda prompt, count: said
    ((verdict,),) = teacher().grade([item("a", response="half of a pair: \ud800")])
    assert verdict.met and verdict.explanation == "your key is [key]"
    echo = chat_server.raw(500, f"you sent Bearer {KEY}".encode())
    chat_server.say = lambda prompt, count: echo
    with pytest.raises(InputError, match=r"\[key\]") as caught:
        teacher(retries=1).grade([item("b")])
    shown = capfd.readouterr()
    texts = [str(caught.value), repr(caught.value), shown.out, shown.err, caplog.text, repr(teacher().config)]
    assert not any(KEY in text for text in texts)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)


def test_no_key_is_needed_where_none_is_named(chat_server, teacher, monkeypatch):
    assert met(teacher(key_env=None).grade([item("a")])) == [[True]]
    assert "Authorization" not in chat_server.headers
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(InputError, match="TEACHER_KEY is not set"):
        teacher()
    monkeypatch.setenv("TEACHER_KEY", "sk-\u00e9")
    with pytest.raises(InputError, match="does not hold a key") as caught:
        teacher()
    assert "\u00e9" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("base_url: ftp://x", "base_url: must be a URL"),
        ("base_url: http://me:secret@x/v1", "must not hold a user"),
        ("votes: 2", "votes: must be odd"),
        ("concurrency: 0", "concurrency: must be at least 1"),
        ("requests_per_minute: .nan", "requests_per_minute"),
        ("parameters: {stream: true}", r"parameters\.stream"),
        ("temprature: 1", "temprature"),
        ("api_key: sk-1", "api_key"),
        ("timeout: [", "teacher.yaml:4: not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, line, message):
    lines = {"base_url": "base_url: http://x/v1", "model": "model: m", "cache": "cache: c.sqlite"}
    lines[line.partition(":")[0]] = line
    path = tmp_path / "teacher.yaml"
    path.write_text("\n".join(lines.values()))
    with pytest.raises(InputError, match=message) as caught:
        TeacherConfig.load(path)
    assert str(path) in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_is_no_cache_is_refused(teacher, tmp_path):
    path = tmp_path / "other.sqlite"
    path.write_text("not a database" * 100)
    with pytest.raises(InputError, match="cache: cannot use .*other.sqlite"):
        teacher(cache=str(path))


def test_the_example_can_be_loaded():
    config = TeacherConfig.load(Path(__file__).resolve().parents[2] / "configs/teachers/gpt-4.1.yaml")
    assert config.key_env == "OPENAI_API_KEY" and config.requests_per_minute
