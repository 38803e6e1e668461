"""Reading a grader's answer. A verdict that cannot be read is None, never "not met".

An answer should be {"explanation": "...", "criteria_met": true}, fenced or bare. Objects are
decoded as JSON wherever they stand, so that an explanation may quote anything; what is left of the
text is searched for the key alone, which reads Python's True, single quotes, a stray comma or an
object that was cut off after the key. All verdicts found must agree.
"""

import json
import re

# Where an object starts: a brace and a key. A lone brace (LaTeX, code) is ordinary text.
_OBJECT = re.compile(r"""\{\s*+(?:["']|\w++\s*+:)""")
# More broken objects than this in one text and it is no verdict; bounds the time on hostile input.
_MAX_BROKEN = 16

# The key with its value, else a whole "string" (up to the end where it never closes) or a comment,
# so that what these quote is not searched. Possessive quantifiers keep this linear.
_KEY = r"""(?<![\w\\])(?P<q>["'`]?)criteria_met(?P=q)\s*+[:=]\s*+
      (?P<v>["'`]?)(?P<value>true|false)(?P=v)(?![\w"'`])
      (?!\s*+(?:/(?![/*])|\||or\b))              # "true or false" repeats the question
    | (?<!:)//[^\n]*+ | /\*(?:[^*]++|\*(?!/))*+(?:\*/)?
    | "(?:[^"\\]++|\\.)*+(?:"|\\?\Z)"""
_FLAGS = re.VERBOSE | re.DOTALL | re.IGNORECASE
_KEY_OR_STRING = re.compile(_KEY, _FLAGS)
# In an object with 'single quotes'; elsewhere they are apostrophes.
_KEY_OR_ANY_STRING = re.compile(_KEY + r"""| '(?:[^'\\]++|\\.)*+(?:'|\\?\Z)""", _FLAGS)
# What may follow a value in a broken object: its end, the next key, a comment.
_NEXT = re.compile(r"""\s*+(?:,\s*+)?(?:[}\]"'`/]|\w++\s*+:|\Z)""")
_EXPLANATION = re.compile(r'"explanation"\s*+:\s*+("(?:[^"\\]++|\\.)*+")', re.DOTALL)


def visible_response(completion: str) -> str:
    """What a user would see: the text after the last </think>, stripped.

    Empty when a <think> is never closed.
    """
    visible = completion.rpartition("</think>")[2]
    return "" if "<think>" in visible else visible.strip()


def parse_verdict(text: str) -> bool | None:
    """The grader's verdict, or None where there is none or two that contradict each other.

    Never raises; time is linear in the length of the text.
    """
    decoded, rest, quote = _decode_objects(visible_response(text))
    found = {_as_bool(value) for pairs in decoded for key, value in pairs if key == "criteria_met"} - {None}
    found |= _loose_verdicts(rest) if quote is None else _broken_verdicts(rest, quote)
    return found.pop() if len(found) == 1 else None


def parse_explanation(text: str) -> str:
    """The "explanation" string of the grader's answer, or "" where there is none."""
    decoded, rest, _ = _decode_objects(visible_response(text))
    for pairs in decoded:
        for key, value in pairs:
            if key == "explanation" and isinstance(value, str):
                return value
    match = _EXPLANATION.search(rest)
    if match is None:
        return ""
    try:
        return json.loads(match[1], strict=False)
    except ValueError:  # a bad escape
        return match[1][1:-1]


def parse_verdicts(text: str, count: int) -> list[tuple[bool | None, str]]:
    """Verdict and explanation of each of `count` criteria from one answer: a JSON list of objects.

    An object is about the criterion that its "item" names, from 1; without any numbers the objects
    stand in order and there must be one for each. Criteria without a verdict, or with two that
    contradict each other, get (None, ""). Never raises.
    """
    decoded, _, _ = _decode_objects(visible_response(text))
    judged = [pairs for pairs in decoded if any(key == "criteria_met" for key, _ in pairs)]
    items = [_as_number(dict(pairs).get("item")) for pairs in judged]
    if set(items) == {None} and len(items) == count:
        items = list(range(1, count + 1))
    answers: list[tuple[bool | None, str]] = []
    for number in range(1, count + 1):
        about = [pairs for pairs, item in zip(judged, items, strict=True) if item == number]
        found = {_as_bool(value) for pairs in about for key, value in pairs if key == "criteria_met"} - {None}
        why = next((v for pairs in about for k, v in pairs if k == "explanation" and isinstance(v, str)), "")
        answers.append((found.pop(), why) if len(found) == 1 else (None, ""))
    return answers


def _as_number(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:9])
    return value if type(value) is int else None


Pairs = list[tuple[str, object]]


def _decode_objects(text: str) -> tuple[list[Pairs], str, str | None]:
    """Every JSON object in the text as its pairs, the text without them, and the first broken one.

    Pairs come from all depths and with repeated keys, so that no contradiction is lost. An object
    that starts after a broken one is dropped: a broken object that quotes another is not answered
    by what it quotes. Of the broken one, the quote before its first key ("" for none), or None
    where no object is broken.
    """
    objects: list[Pairs] = []
    rest: list[str] = []
    found: list[Pairs] = []
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=found.append)
    end = broken = 0
    quote = None
    start = _OBJECT.search(text)
    while start and broken < _MAX_BROKEN:
        found.clear()
        try:
            _, stop = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            broken += 1
            stop = start.end()
            quote = start[0][-1].strip(":") if quote is None else quote
        else:
            rest.append(text[end : start.start()])
            end = stop
            if not broken:
                objects += found
        start = _OBJECT.search(text, stop)
    if start:
        return [], "", ""
    rest.append(text[end:])
    return objects, " ".join(rest), quote


def _as_bool(value: object) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _loose_verdicts(text: str) -> set[bool]:
    """Values of the key `criteria_met` in prose, outside strings."""
    return {_is_true(match) for match in _KEY_OR_STRING.finditer(text) if match["value"]}


def _broken_verdicts(text: str, quote: str) -> set[bool]:
    """Values of the key `criteria_met` where a key of the broken object may stand, quoted as its first is."""
    pattern = _KEY_OR_ANY_STRING if quote == "'" else _KEY_OR_STRING
    return {
        _is_true(match)
        for match in pattern.finditer(text)
        if match["value"]
        and match["q"] == quote
        and _starts_pair(text, match)
        and _NEXT.match(text, match.end())
    }


def _starts_pair(text: str, match: re.Match[str]) -> bool:
    before = text[max(0, match.start() - 64) : match.start()].rstrip(" \t")
    return not before or before.endswith(("{", ",", "\n", "*/"))


def _is_true(match: re.Match[str]) -> bool:
    return match["value"].lower() == "true"
