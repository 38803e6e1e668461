"""Text to token ids and back, and the chat template: Hugging Face and plain SentencePiece files."""

import abc
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from srrl_jax.checkpoints.files import checkpoint_directory, on_disk, read_json
from srrl_jax.checkpoints.gguf_tokenizer import write_tokenizer
from srrl_jax.checkpoints.quoting import control_pattern, quote, unquoted
from srrl_jax.errors import InputError

# What a checkpoint has beside its weights, as globs.
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "config.json", "generation_config.json",
)  # fmt: skip


class Tokenizer(abc.ABC):
    """What the package asks of a tokenizer.

    Attributes:
      stop_ids: ids that end an assistant turn, the end-of-sequence token first.
      pad_id: the id that fills rows; the end-of-sequence token where the files name none.
      size: number of tokens with the added ones; ids from `size` up (the embedding may be padded)
        are never to be sampled.
      made_of: what decides ids and text, and what decides how messages are rendered.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    size: int
    made_of: tuple[bytes, bytes]
    _control: re.Pattern[str]

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered template: nothing is added, and control tokens such as `<|im_start|>`
        that are spelt out in the text become their ids, unless they are quoted."""
        return [i for part in unquoted(text) for i in self._encode(part)]

    def quote(self, text: str) -> str:
        """`text` so marked that `encode` reads the control tokens that it spells as text."""
        return quote(text, self._control)

    def render(self, messages: Sequence[Mapping[str, Any]], thinking: bool) -> str:
        """The chat template's text of `messages` up to where the assistant's turn begins.

        The messages are quoted: what they say is text, only the template's own control tokens are
        control tokens. `thinking` is the template's `enable_thinking`. InputError when the template
        refuses the messages.
        """
        quoted = [{key: self.quote(text) for key, text in message.items()} for message in messages]
        try:
            return self._render(quoted, thinking)
        except Exception as error:  # a template is a program
            raise InputError(f"the chat template refuses the messages: {error}") from None

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _render(self, messages: list[dict[str, str]], thinking: bool) -> str: ...


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Loads the tokenizer of a directory (of a disk or an object store) or hub id.

    `tokenizer.json` is read by transformers' `AutoTokenizer` (never with remote code), a lone
    `tokenizer.model` by SentencePiece. Where neither lies beside a GGUF file, its metadata is read.

    Raises:
      InputError: neither file is there or readable, or there is no chat template or stop token.
    """
    with on_disk(checkpoint_directory(source, TOKENIZER_FILES), TOKENIZER_FILES) as directory:
        if (directory / "tokenizer.json").exists():
            return _HuggingFace(directory)
        if (directory / "tokenizer.model").exists():
            return _SentencePiece(directory)
    with on_disk(checkpoint_directory(source, ("*.gguf",)), ("*.gguf",)) as directory:
        files = sorted(directory.glob("*.gguf"))
        if not files:
            raise InputError(
                f"{source}: no tokenizer; put tokenizer.json or tokenizer.model of the checkpoint there"
            )
        with tempfile.TemporaryDirectory() as written:
            write_tokenizer(files[0], Path(written))
            found = _HuggingFace if (Path(written) / "tokenizer.json").exists() else _SentencePiece
            return found(Path(written))


class _HuggingFace(Tokenizer):
    def __init__(self, directory: Path):
        from transformers import AutoTokenizer  # takes seconds

        try:
            tokens = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises plain Exception on bad files
            raise InputError(f"{directory}: transformers cannot read the tokenizer: {error}") from error
        if not tokens.chat_template:
            raise _no_template(directory)
        self._tokens = tokens
        self.size = len(tokens)
        self.stop_ids = _stop_ids(directory, tokens.eos_token_id, tokens.get_vocab().get, self.size)
        self.pad_id = self.stop_ids[0] if tokens.pad_token_id is None else tokens.pad_token_id
        self.made_of = (
            f"{tokens.backend_tokenizer.to_str()} {self.stop_ids}".encode(),
            json.dumps(tokens.chat_template).encode(),
        )
        added = tokens.added_tokens_decoder.values()
        self._control = control_pattern(
            [token.content for token in added if token.special], [token.content for token in added]
        )

    def _encode(self, text):
        return self._tokens.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids):
        return self._tokens.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _render(self, messages, thinking):
        return self._tokens.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )


class _SentencePiece(Tokenizer):
    """`tokenizer.model` with `tokenizer_config.json` for the names of special tokens.

    Special tokens, which `decode` leaves out, are the model's control symbols and the tokens that
    the config names (`bos_token`, `eos_token`, `pad_token`, `additional_special_tokens` or, as
    transformers 5 writes it, `extra_special_tokens`), with the stop tokens. Other user-defined
    symbols, such as `<think>`, are text. The text between control symbols is encoded piece by
    piece, so a model with a dummy prefix adds it to each (as transformers' `legacy` Llama does).
    """

    def __init__(self, directory: Path):
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        file = directory / "tokenizer.model"
        try:
            pieces = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{file}: not a SentencePiece model: {error}") from None
        config = read_json(directory / "tokenizer_config.json")
        self._pieces = pieces
        self.size = pieces.get_piece_size()

        def find(token: str) -> int | None:
            index = pieces.piece_to_id(token)
            return index if pieces.id_to_piece(index) == token else None

        self._named = {  # what transformers passes to a template
            key: _content(directory, key, config[key])
            for key in ("bos_token", "eos_token", "unk_token", "pad_token")
            if config.get(key)
        }
        extra = [
            _content(directory, key, token)
            for key in ("additional_special_tokens", "extra_special_tokens")
            for token in _listed(directory, key, config.get(key))
        ]
        special = {token: find(token) for token in [*self._named.values(), *extra]}
        unknown = [token for token, index in special.items() if index is None]
        if unknown:
            raise InputError(
                f"{directory / 'tokenizer_config.json'}: token {unknown[0]!r} is not in "
                "tokenizer.model; remove it or train the model with it as a user-defined symbol"
            )

        def named(key: str, default: int) -> int | None:
            token = self._named.get(key)
            return special[token] if token else (default if default >= 0 else None)

        self.stop_ids = _stop_ids(directory, named("eos_token", pieces.eos_id()), find, self.size)
        pad = named("pad_token", pieces.pad_id())
        self.pad_id = self.stop_ids[0] if pad is None else pad

        control = {pieces.id_to_piece(i): i for i in range(self.size) if pieces.is_control(i)}
        self._skipped = {*control.values(), *special.values(), *self.stop_ids, self.pad_id}
        self._ids = control | special
        longest_first = sorted(self._ids, key=len, reverse=True)
        model = ModelProto.FromString(pieces.serialized_model_proto())
        user_defined = [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
        self._control = control_pattern(self._ids, user_defined)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        text, self._template = _template(directory, config)
        named = json.dumps(self._named)
        self.made_of = (pieces.serialized_model_proto() + f"{self.stop_ids} {named}".encode(), text.encode())

    def _encode(self, text):
        ids = []
        for part in self._split.split(text):
            if part in self._ids:
                ids.append(self._ids[part])
            elif part:
                ids += self._pieces.encode(part)
        return ids

    def decode(self, ids):
        return self._pieces.decode([int(i) for i in ids if int(i) not in self._skipped])

    def _render(self, messages, thinking):
        return self._template.render(
            messages=messages, add_generation_prompt=True, enable_thinking=thinking, **self._named
        )


def _content(directory: Path, key: str, token: Any) -> str:
    """The text of a special token, which a file has as a text or as an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise InputError(
            f"{directory / 'tokenizer_config.json'}: {key} must be a token's text, not {token!r}"
        )
    return text


def _listed(directory: Path, key: str, tokens: Any) -> list[Any]:
    if not isinstance(tokens or [], list):
        raise InputError(f"{directory / 'tokenizer_config.json'}: {key} must be a list, not {tokens!r}")
    return tokens or []


def _stop_ids(directory: Path, eos: int | None, find, size: int) -> tuple[int, ...]:
    file = directory / "generation_config.json"
    listed = read_json(file).get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    if not all(i is None or type(i) is int and i >= 0 for i in listed):
        raise InputError(f"{file}: eos_token_id must be a token's id, or a list of them, not {listed}")
    candidates = [eos, find("<|im_end|>"), find("<|endoftext|>"), *listed]
    stop = tuple(dict.fromkeys(i for i in candidates if i is not None and i < size))
    if not stop:
        raise InputError(
            f"{directory}: the tokenizer has no stop token; name one as 'eos_token' in tokenizer_config.json"
        )
    return stop


def _no_template(directory: Path) -> InputError:
    return InputError(
        f"{directory}: the tokenizer has no chat template; put the model's chat_template.jinja "
        "there (base models have none: take that of the instruct model)"
    )


def _template(directory: Path, config: dict[str, Any]) -> tuple[str, jinja2.Template]:
    """The chat template's text, and compiled in the environment that transformers uses."""
    file = directory / "chat_template.jinja"
    text = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if not text:
        raise _no_template(directory)
    if not isinstance(text, str):
        raise InputError(f"{directory / 'tokenizer_config.json'}: chat_template must be a text")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    # Jinja's own filter escapes HTML.
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    try:
        return text, environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{directory}: chat template, line {error.lineno}: {error}") from None
