"""The tokenizer in a GGUF file's metadata, written as the files that `load_tokenizer` reads.

Source: the key names and pre-tokenizers of llama.cpp (`gguf-py/gguf/constants.py`, `src/llama-vocab.cpp`).
"""

import json
from pathlib import Path
from typing import Any

from srrl_jax.errors import InputError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How byte-level BPE cuts text into words, by `tokenizer.ggml.pre`: a pattern; None is GPT-2's own.
_PATTERNS = {
    "qwen2": _WORDS % "",
    "llama-bpe": _WORDS % "{1,3}",
    "llama3": _WORDS % "{1,3}",
    "smollm": None,
    "gpt-2": None,
    "default": None,
}
_CONTROL, _USER_DEFINED = 3, 4  # token types


def write_tokenizer(file: Path, directory: Path) -> None:
    """Writes tokenizer, chat template and stop tokens of a GGUF file into a directory.

    Raises:
      InputError: the file has no tokenizer, no chat template, or a kind that is not known (names it).
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(f"{file}: truncated or not a GGUF file ({error}); fetch it again") from None

    def field(name: str, default: Any = None) -> Any:
        found = fields.get(f"tokenizer.{name}")
        return default if found is None else found.contents()

    kind, tokens = field("ggml.model"), field("ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise InputError(
            f"{file}: tokenizer {kind!r} in its metadata is not known, only gpt2 (byte-level BPE) and llama "
            "(SentencePiece); put tokenizer.json of the original checkpoint beside it"
        )
    if not field("chat_template"):
        raise InputError(f"{file}: has no chat template; put tokenizer files with one beside it")
    kinds = field("ggml.token_type", [1] * len(tokens))
    (_write_bpe if kind == "gpt2" else _write_sentencepiece)(file, directory, field, tokens, kinds)

    def token(name: str) -> str | None:
        index = field(f"ggml.{name}_token_id")
        return None if index is None else tokens[index]

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {f"{ours}_token": text for ours, theirs in names.items() if (text := token(theirs)) is not None}
    _write(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config,
    })  # fmt: skip
    stops = [field(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    _write(directory / "generation_config.json", {"eos_token_id": [i for i in stops if i is not None]})
    (directory / "chat_template.jinja").write_text(field("chat_template"), encoding="utf-8")


def _write_bpe(file: Path, directory: Path, field, tokens: list[str], kinds: list[int]) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    cut = field("ggml.pre", "default")
    if cut not in _PATTERNS:
        raise InputError(
            f"{file}: pre-tokenizer {cut!r} in its metadata is not known, only {', '.join(_PATTERNS)}; put "
            "tokenizer.json of the original checkpoint beside it"
        )
    pattern, llama3 = _PATTERNS[cut], cut in ("llama-bpe", "llama3")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=llama3))
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    before = [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
    if pattern is not None:
        before = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [AddedToken(t, normalized=False, special=special) for t, k in zip(tokens, kinds, strict=True)
                 if k == kind]  # fmt: skip
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    tokenizer.save(str(directory / "tokenizer.json"))


def _write_sentencepiece(file: Path, directory: Path, field, tokens: list[str], kinds: list[int]) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    for token, score, kind in zip(tokens, field("ggml.scores"), kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(tokens), 6 in kinds
    for name, key in (("unk_id", "unknown"), ("bos_id", "bos"), ("eos_id", "eos"), ("pad_id", "padding")):
        setattr(trainer, name, field(f"ggml.{key}_token_id", 0 if key == "unknown" else -1))
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = field("ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = field("ggml.remove_extra_whitespaces", False)
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
