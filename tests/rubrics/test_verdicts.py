import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srrl_jax.rubrics import parse_explanation, parse_verdict, parse_verdicts, visible_response

FENCED = '```json\n{\n  "explanation": "It does.",\n  "criteria_met": true\n}\n```'


@pytest.mark.parametrize(
    ("completion", "visible"),
    [
        ("Hello.", "Hello."),
        ("<think>\nhm\n</think>\n\nHello.", "Hello."),
        ("hm\n</think>\nHello.", "Hello."),  # the chat template had opened it
        ("<think>a</think>b<think>c</think> d", "d"),
        ("<think>never closed", ""),
        ("<think>a</think>b<think>c", ""),
        ("<think>a</think>", ""),
        ("", ""),
    ],
)
def test_visible_response(completion, visible):
    assert visible_response(completion) == visible


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (FENCED, True),
        ("Here is my answer:\n" + FENCED + "\nDone.", True),
        ('```\n{"criteria_met": false}\n```', False),
        ('```json\n{"criteria_met": false}', False),  # fence not closed
        ('{"explanation": "x", "criteria_met": false}', False),
        ('{"criteria_met": true, "explanation": "x"}', True),
        ('<think>"criteria_met": false</think>{"criteria_met": true}', True),
        ('{"criteria_met": "true"}', True),
        ('{"criteria_met": " False "}', False),
        ('{"result": {"criteria_met": true}}', True),
        ('[{"criteria_met": false}]', False),
        ('{"explanation": "two\nlines", "criteria_met": true}', True),
        ('"criteria_met": true', True),
        ('  "criteria_met"  :  true', True),
        ("'criteria_met': True", True),
        ('The verdict is "criteria_met": false.', False),
        ("criteria_met: true", True),
        ("{'explanation': 'it\\'s fine', 'criteria_met': False}", False),
        ("{criteria_met: True}", True),
        ('{"explanation": "x", "criteria_met": true,}', True),
        ('{"explanation": "x", "criteria_met": True}', True),
        ('{"explanation": "x", "criteria_met": true', True),  # cut off after the key
        ('{"explanation": "\\alpha is no JSON escape", "criteria_met": false}', False),
        ('{"explanation": "He asked "why" twice", "criteria_met": true}', True),
        ("Doses of \\frac{a}{b} in {x} are fine. " + FENCED, True),
    ],
)
def test_readable(text, verdict):
    assert parse_verdict(text) is verdict


QUOTES = [
    '"criteria_met": true',
    "'criteria_met': true",
    '{"criteria_met": true}',
    "criteria_met: true",
    '```json\n{"criteria_met": true}\n```',
    '}\n```\n```json\n{"explanation": "", "criteria_met": true}',
]


@pytest.mark.parametrize("quote", QUOTES)
def test_what_an_explanation_quotes_is_not_the_verdict(quote):
    answer = json.dumps({"explanation": f"It printed {quote} itself.", "criteria_met": False})
    assert parse_verdict(answer) is False
    assert parse_verdict(f"```json\n{answer}\n```") is False


@pytest.mark.parametrize("quote", QUOTES)
@pytest.mark.parametrize("start", ['{"explanation": "', "{'explanation': '", '```json\n{"explanation":"'])
def test_quoting_without_escapes_never_turns_false_into_true(start, quote):
    broken = f'{start}It printed {quote} itself.", "criteria_met": false}}'
    assert parse_verdict(broken) is not True


@pytest.mark.parametrize("quote", QUOTES)
@pytest.mark.parametrize("start", ['{"explanation": "', "{'explanation': '", '```json\n{"explanation":"'])
def test_cut_off_while_quoting_is_unscorable(start, quote):
    assert parse_verdict(f"{start}It printed {quote} itself, and") is None
    escaped = json.dumps(f"It printed {quote} itself, and")[1:-1]
    assert parse_verdict(f"{start}{escaped}") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "true",
        "I cannot tell.",
        "<html><body><h1>502 Bad Gateway</h1></body></html>",
        '<think>{"criteria_met": true}',
        '{"explanation": "The response',
        '{"explanation": "x", "criteria_met"',
        '{"explanation": "x", "criteria_met": tr',
        '{"explanation": "x", "criteria_met": null}',
        '{"criteria_met": "maybe"}',
        '{"criteria_met": 1}',
        '{"not_criteria_met": true}',
        '"criteria_met": trueish',
        '"criteria_met": true or false',
        '{"explanation": "...", "criteria_met": true/false}',
        '{"criteria_met": true} {"criteria_met": false}',
        FENCED + "\n" + FENCED.replace("true", "false"),
        FENCED + '\nNo, "criteria_met": false.',
        '{"criteria_met": true, "criteria_met": false}',
        '"criteria_met": true, then "criteria_met": false',
        "{" * 1000,
        '{"a":' * 5000,
        '{"criteria_met": ' + "9" * 5000 + "}",
        "\x00\ud800",
    ],
)
def test_unscorable(text):
    assert parse_verdict(text) is None


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        '{"',
        '{"a":',
        '{"a":[',
        '{"a":"',
        "{'",
        '"',
        '\\"',
        '"\\',
        "\n",
        " ",
        "`",
        "criteria_met",
        '"criteria_met": ',
        '"criteria_met": true ',
        '{"criteria_met": true}',
        '{"criteria_met": true, ',
        "<think>",
        "</think>",
        '```json\n{"',
        '"explanation": "',
    ],
)
@pytest.mark.parametrize("start", ["", '{"explanation": "', "{'a': "])
def test_one_megabyte_of_hostile_text_takes_linear_time(piece, start):
    text = start + piece * (1_000_000 // len(piece))
    began = time.process_time()
    parse_verdict(text)
    parse_explanation(text)
    assert time.process_time() - began < 2  # takes 0.3 s; a quadratic scan takes minutes


def corpus() -> list:
    path = Path(__file__).with_name("replies.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [pytest.param(row["text"], row["verdict"], id=row["name"]) for row in rows]


@pytest.mark.parametrize(("text", "verdict"), corpus())
def test_replies_as_models_and_endpoints_write_them(text, verdict):
    assert parse_verdict(text) is verdict
    assert parse_verdict(text + " lorem ipsum" * 80_000) in (verdict, None)  # 1 MB


FRAGMENTS = ['"', "'", "{", "}", "\\", "\n", ",", ":", "true", "false", "True", "```json", "```"]
FRAGMENTS += ["<think>", "</think>", "criteria_met", "explanation", '"criteria_met": true']
FRAGMENTS += ['{"criteria_met": false}', '"explanation": "', " "]


@given(st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS)).map("".join)))
def test_never_crashes(text):
    assert parse_verdict(text) in (True, False, None)
    assert isinstance(parse_explanation(text), str)


DAMAGE = {
    "none": lambda text: text,
    "fence": lambda text: f"```json\n{text}",
    "page": lambda text: f"<html><body><p>{text}</p></body></html>",
    "comma": lambda text: text[:-1] + ",}",
    "comment": lambda text: text[:-1] + " // as the rubric says\n}",
    "twice": lambda text: f"{text}\n{text}",
    "trail": lambda text: text + "\n答案：不。 Do you agree?",
    "string": lambda text: text.replace("true}", '"true"}').replace("false}", '"false"}'),
    "python": lambda text: text.replace("true}", "True}").replace("false}", "False}"),
}


@settings(max_examples=300)
@given(
    explanation=st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS)).map("".join)),
    met=st.booleans(),
    write=st.sampled_from([json.dumps, repr]),
    damage=st.sampled_from(sorted(DAMAGE)),
    cut=st.one_of(st.none(), st.integers(0, 200)),
)
def test_damage_never_turns_a_verdict_round(explanation, met, write, damage, cut):
    answer = write({"explanation": explanation.replace("think>", ""), "criteria_met": met})
    assert parse_verdict(DAMAGE[damage](answer)[:cut]) in (met, None)


@given(
    explanation=st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS)).map("".join)),
    met=st.booleans(),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
    frame=st.sampled_from(["{}", "```json\n{}\n```", "<think>hm {{</think>\n{}", "Sure.\n{}\n"]),
)
def test_round_trip_whatever_the_explanation_says(explanation, met, indent, ascii_only, frame):
    explanation = explanation.replace("think>", "")
    answer = {"explanation": explanation, "criteria_met": met}
    text = frame.format(json.dumps(answer, indent=indent, ensure_ascii=ascii_only))
    assert parse_verdict(text) is met
    assert parse_explanation(text) == explanation


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        (FENCED, "It does."),
        ('<think>x</think>{"explanation": "a \\"b\\"", "criteria_met": true,}', 'a "b"'),
        ('{"explanation": "\\alpha", "criteria_met": true}', "\\alpha"),
        ('{"explanation": "cut off', ""),
        ('{"explanation": 3, "criteria_met": true}', ""),
        ("", ""),
    ],
)
def test_explanation(text, explanation):
    assert parse_explanation(text) == explanation


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ('[{"item": 1, "criteria_met": true}, {"item": 2, "criteria_met": false}]', [True, False]),
        ('[{"item": 2, "criteria_met": true}, {"item": "1", "criteria_met": "False"}]', [False, True]),
        ('```json\n[{"criteria_met": true},\n{"criteria_met": false}]\n```', [True, False]),
        (
            '{"verdicts": [{"item": 1, "criteria_met": true}, {"item": 2, "criteria_met": true}]}',
            [True, True],
        ),
        ('{"item": 1, "criteria_met": true}\n{"item": 2, "criteria_met": false}', [True, False]),
        ('[{"item": 1, "criteria_met": true}, {"item": 2, "explanation": "cut', [True, None]),
        ('[{"item": 2, "criteria_met": true}]', [None, True]),
        ('[{"item": 1, "criteria_met": true}, {"item": 1, "criteria_met": false}]', [None, None]),
        ('[{"item": 0, "criteria_met": true}, {"item": 3, "criteria_met": false}]', [None, None]),
        ('[{"criteria_met": true}]', [None, None]),  # of which of the two?
        ('[{"criteria_met": true}, {"criteria_met": true}, {"criteria_met": true}]', [None, None]),
        ('[{"item": true, "criteria_met": true}, {"item": 2, "criteria_met": null}]', [None, None]),
        ("[true, false]", [None, None]),
        ("", [None, None]),
        ('[{"item": 1, "criteria_met": true}, ' * 30_000, [True, None]),
    ],
)
def test_a_list_of_verdicts(text, met):
    assert [verdict for verdict, _ in parse_verdicts(text, 2)] == met


@given(
    answers=st.lists(st.tuples(st.text(), st.booleans()), min_size=1, max_size=5),
    numbered=st.booleans(),
    indent=st.sampled_from([None, 1]),
    cut=st.one_of(st.none(), st.integers(0, 200)),
)
def test_a_list_is_read_back_and_its_damage_never_turns_a_verdict_round(answers, numbered, indent, cut):
    rows = [{"item": n, "explanation": why, "criteria_met": met} for n, (why, met) in enumerate(answers, 1)]
    if not numbered:
        rows = [{key: row[key] for key in ("explanation", "criteria_met")} for row in rows]
    text = json.dumps(rows, indent=indent).replace("think>", "")
    whole = [(met, why.replace("think>", "")) for why, met in answers]
    read = parse_verdicts(text[:cut], len(answers))
    assert all(one == (None, "") or one == other for one, other in zip(read, whole, strict=True))
    assert cut is not None or read == whole
