"""A GGUF file alone gives the tokenizer that it was made from."""

import json
from pathlib import Path

import gguf
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"
)
TEXTS = [
    (ROOT / "README.md").read_text(),
    "It's 38.5 °C,  and\n\n 2 tabs\t\tthen naïve 中文 🙂\r\n\n 1234",
    "<|im_start|>user<think> no </think>",
]


def write(
    path, *, model="gpt2", tokens, types, pre="qwen2", template=TEMPLATE, merges=(), scores=None, **ids
):
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(merges)
    if scores:
        writer.add_token_scores(scores)
    for name, index in ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def from_tokenizer_json(path, directory):
    """What llama.cpp's convert_hf_to_gguf.py takes of a byte-level BPE."""
    spec = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = dict(spec["model"]["vocab"])
    added = {token["content"]: token for token in spec["added_tokens"]}
    vocabulary |= {text: token["id"] for text, token in added.items()}
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = [(3 if added[t]["special"] else 4) if t in added else 1 for t in tokens]
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    file = directory / "chat_template.jinja"
    config = json.loads((directory / "tokenizer_config.json").read_text())
    template = file.read_text() if file.exists() else config["chat_template"]
    stop = vocabulary["<|im_end|>"]
    write(path, tokens=tokens, types=types, merges=merges, template=template, eos=stop, pad=stop)


def agrees(ours, theirs, texts):
    assert ours.size == theirs.size and set(theirs.stop_ids) >= set(ours.stop_ids)
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
    chat = [{"role": "user", "content": TEXTS[1]}]
    assert ours.render(chat, thinking=False) == theirs.render(chat, thinking=False)


def small_bpe(directory):
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    made.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    made.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


def test_byte_level_bpe(tmp_path):
    (original := tmp_path / "original").mkdir()
    small_bpe(original)
    (alone := tmp_path / "alone").mkdir()
    from_tokenizer_json(alone / "model.gguf", original)
    agrees(load_tokenizer(alone), load_tokenizer(original), TEXTS)


@pytest.mark.slow
def test_qwen3_on_real_text(shared_data, tmp_path):
    from_tokenizer_json(tmp_path / "model.gguf", shared_data / "qwen3-tokenizer")
    rows = [
        json.loads(line) for line in (shared_data / "healthbench/hard.jsonl").read_text().splitlines()[:300]
    ]
    texts = [turn["content"] for row in rows for turn in row["prompt"]]
    agrees(load_tokenizer(tmp_path), load_tokenizer(shared_data / "qwen3-tokenizer"), TEXTS + texts)


def test_sentencepiece(tmp_path):
    (original := tmp_path / "original").mkdir()
    (original / "text.txt").write_text(TEXTS[0])
    sentencepiece.SentencePieceTrainer.train(
        input=str(original / "text.txt"), model_prefix=str(original / "tokenizer"), vocab_size=600,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (original / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "bos_token": "<s>"})
    )
    (original / "chat_template.jinja").write_text(TEMPLATE)
    model = ModelProto.FromString((original / "tokenizer.model").read_bytes())
    tokens = [piece.piece for piece in model.pieces]
    (alone := tmp_path / "alone").mkdir()
    write(
        alone / "model.gguf", model="llama", tokens=tokens, types=[piece.type for piece in model.pieces],
        scores=[piece.score for piece in model.pieces], unk=0, bos=1, eos=tokens.index("<|im_end|>"),
    )  # fmt: skip
    agrees(load_tokenizer(alone), load_tokenizer(original), TEXTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer 'bert' in its metadata is not known"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' in its metadata is not known"),
        ({"template": None}, "has no chat template"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_named(tmp_path, changes, message):
    write(tmp_path / "model.gguf", **{"tokens": ["a", "b"], "types": [1, 1], "eos": 1} | changes)
    with pytest.raises(InputError, match=f"model.gguf: {message}"):
        load_tokenizer(tmp_path)
