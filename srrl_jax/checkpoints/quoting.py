"""Control tokens that are spelt out in somebody's text stay text.

A prompt, a response or a criterion may contain `<|im_end|>` or `<think>`. Before a chat template is
rendered, `quote` puts a mark in front of every such spelling; the template's own have none. When the
result is encoded, `unquoted` cuts a marked spelling after its first character, so that no tokenizer
sees it whole. Text without such spellings is encoded exactly as it would be without all this.
"""

import re
from collections.abc import Iterable

MARK = "\ufdd0"  # a noncharacter: Unicode keeps it out of text, and no template strips it as a blank
_AFTER_MARKED = re.compile(f"(?<={MARK}.)", re.DOTALL)


def control_pattern(special: Iterable[str], others: Iterable[str]) -> re.Pattern[str]:
    """Matches (at zero width) where the text spells a control token.

    That is a `special` token or one of the `others` (tokens that are matched in text before it is
    cut into pieces) that looks like markup, as `<think>` does, which Qwen3 does not call special.
    A token of one character cannot be cut, and is left out.
    """
    tokens = [*special, *(token for token in others if re.fullmatch(r"<\S+>", token))]
    spelt = "|".join(re.escape(token) for token in tokens if len(token) > 1)
    return re.compile(f"(?={spelt})" if spelt else r"(?!)")


def quote(text: str, control: re.Pattern[str]) -> str:
    """`text` with a mark before every spelling of a control token; marks of its own are dropped."""
    return control.sub(MARK, text.replace(MARK, ""))


def unquoted(text: str) -> list[str]:
    """The parts that are to be encoded one by one; the whole text where nothing is marked."""
    return [part.replace(MARK, "") for part in _AFTER_MARKED.split(text)]
