import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srrl_jax.rubrics import parse_explanation, parse_verdict, visible_response

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
    assert time.process_time() - began < 8  # a quadratic scan takes minutes


FRAGMENTS = ['"', "'", "{", "}", "\\", "\n", ",", ":", "true", "false", "True", "```json", "```"]
FRAGMENTS += ["<think>", "</think>", "criteria_met", "explanation", '"criteria_met": true']
FRAGMENTS += ['{"criteria_met": false}', '"explanation": "', " "]


@given(st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS)).map("".join)))
def test_never_crashes(text):
    assert parse_verdict(text) in (True, False, None)
    assert isinstance(parse_explanation(text), str)


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
