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

# The key with its value, else a whole "string" (up to the end where it never closes), so that
# what a string quotes is not searched. Possessive quantifiers keep this linear.
_KEY_OR_STRING = re.compile(
    r"""(?<![\w\\])(?P<q>["'`]?)criteria_met(?P=q)\s*+[:=]\s*+
        (?P<v>["'`]?)(?P<value>true|false)(?P=v)(?![\w"'`])
        (?!\s*+(?:/|\||or\b))                     # "true or false" repeats the question
      | "(?:[^"\\]++|\\.)*+(?:"|\\?\Z)""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
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
    decoded, rest, broken = _decode_objects(visible_response(text))
    found = {_as_bool(value) for key, value in decoded if key == "criteria_met"} - {None}
    found |= _loose_verdicts(rest, inside_object=broken)
    return found.pop() if len(found) == 1 else None


def parse_explanation(text: str) -> str:
    """The "explanation" string of the grader's answer, or "" where there is none."""
    decoded, rest, _ = _decode_objects(visible_response(text))
    for key, value in decoded:
        if key == "explanation" and isinstance(value, str):
            return value
    match = _EXPLANATION.search(rest)
    try:
        return json.loads(match[1], strict=False) if match else ""
    except ValueError:  # a bad escape
        return match[1][1:-1]


def _decode_objects(text: str) -> tuple[list[tuple[str, object]], str, bool]:
    """Every JSON object in the text: its pairs, the text without them, and if any was broken.

    Pairs come from all depths and with repeated keys, so that no contradiction is lost. An object
    that starts after a broken one is dropped: a broken object that quotes another is not answered
    by what it quotes.
    """
    pairs: list[tuple[str, object]] = []
    rest: list[str] = []
    end = broken = 0
    start = _OBJECT.search(text)
    while start and broken < _MAX_BROKEN:
        found: list[list[tuple[str, object]]] = []
        decoder = json.JSONDecoder(strict=False, object_pairs_hook=found.append)
        try:
            _, stop = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            broken += 1
            stop = start.end()
        else:
            rest.append(text[end : start.start()])
            end = stop
            if not broken:
                pairs += [pair for obj in found for pair in obj]
        start = _OBJECT.search(text, stop)
    if start:
        return [], "", True
    rest.append(text[end:])
    return pairs, " ".join(rest), broken > 0


def _as_bool(value: object) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _loose_verdicts(text: str, inside_object: bool) -> set[bool]:
    """Values of the key `criteria_met` outside strings; in an object only where a key may stand."""
    found = set()
    for match in _KEY_OR_STRING.finditer(text):
        before = text[max(0, match.start() - 64) : match.start()].rstrip(" \t")
        if match["value"] and (not inside_object or before.endswith(("{", ",", "\n")) or not before):
            found.add(match["value"].lower() == "true")
    return found
