"""The grader's prompt: a template split into the text before the criterion and the rest.

All criteria of one response share the first part, so a grader can compute it once. How much that
is depends on the template: "shared" puts the constant instructions first and only a closing line
after the criterion; "healthbench" keeps the order of OpenAI simple-evals (conversation, rubric
item, instructions), where the long instructions come again after every criterion.

A response may try to instruct the grader. Where the template names {response} apart from
{conversation}, it stands between two fences that it cannot close, as "shared" does; "healthbench"
keeps the form of the original, in which the response is the last turn of the conversation.
"""

import ast
import hashlib
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from srrl_jax.rubrics.types import Criterion, Message

TEMPLATES = ("shared", "healthbench")
# By which simple-evals' GRADER_TEMPLATE (of 2025) is known when it is loaded; its text is not kept here.
SIMPLE_EVALS_SHA256 = "8fa31360f89e6997fd1519d7694379af65668e5a24ea3b84392f2f75d05d563d"
CONVERSATION, RESPONSE, CRITERION = "{conversation}", "{response}", "{criterion}"
_TOGETHER = """\
There are {count} numbered rubric items above. Judge each by itself, and answer with one JSON list of \
{count} objects, in their order: [{{"item": 1, "explanation": "...", "criteria_met": true or false}}, ...]"""


def load_template(name_or_path: str) -> str:
    """Text of the template "shared", "healthbench", or of the file at this path.

    A template names {conversation}, then {response} if it is to stand apart, then {criterion}, each
    once. The placeholders of simple-evals (<<conversation>>, <<rubric_item>>) are read too. Of a
    Python file the template is its constant GRADER_TEMPLATE, so that simple-evals' own
    healthbench_eval.py can be given as it is; nothing of the file is run. Raises ValueError that
    names the template and the mend.
    """
    if name_or_path in TEMPLATES:
        folder = resources.files("srrl_jax.rubrics") / "templates"
        text = (folder / f"{name_or_path}.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"cannot read the grader template {name_or_path!r} ({error}): give "
                f"{' or '.join(TEMPLATES)}, or the path of a UTF-8 text file"
            ) from error
        if Path(name_or_path).suffix == ".py":
            text = _constant(text, "GRADER_TEMPLATE", name_or_path)
    text = text.strip().replace("<<conversation>>", CONVERSATION)
    text = text.replace("<<rubric_item>>", CRITERION)
    for placeholder in (CONVERSATION, CRITERION):
        if text.count(placeholder) != 1:
            raise ValueError(
                f"grader template {name_or_path!r} has {text.count(placeholder)} {placeholder}: "
                "it must have exactly one"
            )
    if text.count(RESPONSE) > 1:
        raise ValueError(f"grader template {name_or_path!r}: name {RESPONSE} once at most")
    if max(text.index(CONVERSATION), text.find(RESPONSE)) > text.index(CRITERION):
        raise ValueError(
            f"grader template {name_or_path!r}: put {CONVERSATION} and {RESPONSE} before {CRITERION}, "
            "so that the criteria of one response share a prefix"
        )
    return text


def template_sha256(template: str) -> str:
    """Tells loaded templates apart by their text, whatever their files are called."""
    return hashlib.sha256(template.encode()).hexdigest()


def grader_prompt(template: str, messages: Sequence[Message], response: str) -> str:
    """The grader's user message up to the criterion, the same for all criteria of a response.

    `messages` is the conversation and `response` the text that its user would see. Turns read
    "role: content", joined by a blank line (simple-evals). The response is put between two equal
    lines of = signs, more of them than either text has in a row, where the template has {response},
    and else becomes the last turn.
    """
    turns = [f"{message['role']}: {message['content']}" for message in messages]
    fenced = RESPONSE in template
    conversation = "\n\n".join(turns if fenced else [*turns, f"assistant: {response}"])
    longest = max(map(len, re.findall("=+", conversation + "\n" + response)), default=0)
    fence = "=" * max(8, longest + 1)
    values = {CONVERSATION: conversation, RESPONSE: f"{fence}\n{response}\n{fence}"}
    before_criterion, _, _ = template.partition(CRITERION)
    # In one pass: what a text says in braces is not a placeholder.
    return re.sub(r"\{(?:conversation|response)\}", lambda match: values[match[0]], before_criterion)


def criterion_prompt(template: str, criterion: Criterion) -> str:
    """The rest of the grader's user message: "[points] criterion" and what follows it.

    Where the points are not known (NaN) the criterion stands alone, as in simple-evals' meta-evaluation.
    `grader_prompt(...) + criterion_prompt(...)` is the whole message.
    """
    _, _, after_criterion = template.partition(CRITERION)
    return _pointed(criterion) + after_criterion


def criteria_prompt(template: str, criteria: Sequence[Criterion]) -> str:
    """As `criterion_prompt` for several criteria at once, numbered from 1; asks for a list of verdicts.

    `parse_verdicts` reads the answer.
    """
    listed = "\n".join(f"{number}. {_pointed(criterion)}" for number, criterion in enumerate(criteria, 1))
    _, _, after_criteria = template.partition(CRITERION)
    return f"{listed}{after_criteria}\n\n{_TOGETHER.format(count=len(criteria))}"


def _constant(source: str, name: str, path: str) -> str:
    """The string, with `.strip()` or without, that a Python source assigns to `name` at its top level."""
    try:
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == name for t in node.targets):
                value = node.value
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
                    value = value.func.value if value.func.attr == "strip" else value
                text = ast.literal_eval(value)
                if isinstance(text, str):
                    return text
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise ValueError(
        f"{path} has no string {name} = ...: give simple-evals' healthbench_eval.py, or a text file"
    )


def _pointed(criterion: Criterion) -> str:
    points = criterion.points
    if math.isnan(points):
        return criterion.criterion
    return f"[{int(points) if float(points).is_integer() else points}] {criterion.criterion}"
