"""Both tokenizer backings: Hugging Face files and a plain SentencePiece model."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.errors import InputError

CHAT = [{"role": "user", "content": "What helps against a cold?"}]
TEMPLATE = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + eos_token + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think>\\n\\n</think>\\n\\n') }}\n"
    "{%- endif %}\n"
)
USER_DEFINED = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]


@pytest.fixture(scope="session")
def qwen3(shared_data):
    return load_tokenizer(shared_data / "qwen3-tokenizer")


def test_qwen3_sizes_and_ids(qwen3):
    assert qwen3.size == 151_669
    assert qwen3.stop_ids == (151645, 151643)
    assert qwen3.pad_id == 151643


def test_qwen3_renders_thinking_on_and_off(qwen3):
    start = "<|im_start|>user\nWhat helps against a cold?<|im_end|>\n<|im_start|>assistant\n"
    assert qwen3.render(CHAT, thinking=True) == start
    assert qwen3.render(CHAT, thinking=False) == start + "<think>\n\n</think>\n\n"


def test_qwen3_encodes_control_tokens_and_skips_them(qwen3):
    ids = qwen3.encode(qwen3.render(CHAT, thinking=False))
    assert ids[0] == 151644 and ids.count(151645) == 1
    assert ids.count(151667) == ids.count(151668) == 1
    text = qwen3.decode(ids)
    assert "<|im_" not in text
    assert "<think>" in text  # the grader must see where thinking ends
    assert text.startswith("user\nWhat helps against a cold?")


@pytest.mark.parametrize("text", ["", "A fever of 38.5 °C , and  two spaces", "naïve 中文 🙂\n\n\tx "])
def test_qwen3_text_survives(qwen3, text):
    ids = qwen3.encode(text)
    assert qwen3.decode(ids) == text
    assert all(0 <= i < qwen3.size for i in ids)


def test_smollm2_stop_ids(shared_data):
    tokenizer = load_tokenizer(shared_data / "smollm2-135m")
    assert tokenizer.stop_ids == (2, 0)
    assert (tokenizer.pad_id, tokenizer.size) == (2, 49152)
    text = tokenizer.render(CHAT, thinking=True)
    assert tokenizer.encode(text)[0] == 1 and text.endswith("<|im_start|>assistant\n")


@pytest.mark.slow
def test_derived_from_gguf_alone(smollm2, shared_data, tmp_path):
    """What scripts/get_smollm2.py writes where the shared files are absent."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "get_smollm2.py"
    spec = importlib.util.spec_from_file_location("get_smollm2", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / script.GGUF).symlink_to(smollm2 / script.GGUF)
    script.derive(tmp_path)
    derived, shared = load_tokenizer(tmp_path), load_tokenizer(shared_data / "smollm2-135m")
    for name in ("stop_ids", "pad_id", "size"):
        assert getattr(derived, name) == getattr(shared, name)
    text = shared.render([{"role": "user", "content": "Take 250 mg, naïve 中文\tok"}], thinking=True)
    assert derived.render([{"role": "user", "content": "Take 250 mg, naïve 中文\tok"}], True) == text
    assert derived.encode(text) == shared.encode(text)
    assert derived.decode(derived.encode(text)) == shared.decode(shared.encode(text))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    text.write_text("drink warm tea and rest\ncall a doctor if the fever stays\nwhat helps?\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        user_defined_symbols=USER_DEFINED,
        control_symbols=["<|endoftext|>"],
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>"},
        "additional_special_tokens": ["<|im_start|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "tokenizer"))


def test_sentencepiece_ids(folder):
    tokenizer = load_tokenizer(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    end, text_end = pieces.piece_to_id("<|im_end|>"), pieces.piece_to_id("<|endoftext|>")
    assert tokenizer.stop_ids == (end, text_end)
    assert tokenizer.pad_id == text_end
    assert tokenizer.size == pieces.get_piece_size()


def test_sentencepiece_template_as_transformers_renders_it(folder):
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = load_tokenizer(folder)
    for thinking in (True, False):
        (expected,), _ = render_jinja_template(
            [CHAT], chat_template=TEMPLATE, add_generation_prompt=True, enable_thinking=thinking,
            eos_token="<|im_end|>",
        )  # fmt: skip
        assert tokenizer.render(CHAT, thinking) == expected
    assert expected.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_sentencepiece_encodes_special_tokens_as_one_id(folder):
    tokenizer = load_tokenizer(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = tokenizer.encode("<|im_start|>user\nwhat helps?<|im_end|>\n<think>tea</think><|endoftext|>")
    for token in [*USER_DEFINED, "<|endoftext|>"]:
        assert ids.count(pieces.piece_to_id(token)) == 1
    assert tokenizer.decode(ids) == "user\nwhat helps?\n<think>tea</think>"


@pytest.mark.parametrize("text", ["", "drink  tea ", " naïve 中文 🙂\n\n\tx"])
def test_sentencepiece_text_survives(folder, text):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_template_in_the_config(folder):
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    assert load_tokenizer(folder).render(CHAT, True).endswith("assistant\n")


@pytest.mark.parametrize("eos, added", [(5, [5]), ([7, 5], [7, 5]), (10**6, [])])
def test_generation_config_adds_stop_ids(folder, eos, added):
    before = load_tokenizer(folder).stop_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    expected = [*before, *(i for i in added if i not in before)]
    assert list(load_tokenizer(folder).stop_ids) == expected


@pytest.mark.parametrize("source", ["sentencepiece", "huggingface"])
def test_no_chat_template(folder, shared_data, tmp_path, source):
    if source == "sentencepiece":
        (folder / "chat_template.jinja").unlink()
    else:
        folder = tmp_path / "hf"
        folder.mkdir()
        shutil.copyfile(shared_data / "smollm2-135m" / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(InputError, match="chat_template.jinja"):
        load_tokenizer(folder)


def test_template_may_refuse(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match="no system role"):
        load_tokenizer(folder).render(CHAT, True)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    with pytest.raises(InputError, match="chat template.*concatenate"):
        load_tokenizer(folder).render(CHAT, True)


def test_template_is_sandboxed(folder):
    (folder / "chat_template.jinja").write_text("{{ messages.append(1) }}{{ ''.__class__.__mro__ }}")
    with pytest.raises(InputError, match="unsafe"):
        load_tokenizer(folder).render(CHAT, True)


def test_broken_files_are_named(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("{% for")
    with pytest.raises(InputError, match="chat template, line 1"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    with pytest.raises(InputError, match=r"tokenizer_config.json: token '<\|stop\|>'"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(InputError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        load_tokenizer(folder)
    with pytest.raises(InputError, match="tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "eos_token", 7),
        ("tokenizer_config.json", "pad_token", {"text": "<pad>"}),
        ("tokenizer_config.json", "extra_special_tokens", "<end>"),
        ("tokenizer_config.json", "chat_template", 1.5),
        ("generation_config.json", "eos_token_id", ["2"]),
        ("generation_config.json", "eos_token_id", -1),
    ],
)
def test_a_key_of_another_type_is_named_with_its_file(folder, file, key, value):
    if key == "chat_template":
        (folder / "chat_template.jinja").unlink()
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {key: value}))
    with pytest.raises(InputError, match=rf"{file}: {key} must be"):
        load_tokenizer(folder)
