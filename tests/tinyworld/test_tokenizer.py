import json
from pathlib import Path
from random import Random

import jinja2
import pytest
import sentencepiece

from srrl_jax.rubrics import criterion_prompt, grader_prompt, load_template
from srrl_jax.tinyworld.corpus import pretraining_tree
from srrl_jax.tinyworld.tokenizer import (
    CHECKPOINT,
    GRADER_TEMPLATE,
    POINTS,
    SKELETON,
    VOCAB_SIZE,
    train_tokenizer,
)

TEMPLATE = load_template(str(GRADER_TEMPLATE))


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))


@pytest.fixture(scope="module")
def trees():
    rng = Random(5)
    return [pretraining_tree(rng) for _ in range(100)]


def render(messages, add_generation_prompt=False):
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())
    template = jinja2.Template(config["chat_template"])
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def chats(tree):
    prompt, response = tree["prompt"], tree["response"]
    yield [*prompt, {"role": "assistant", "content": response}]
    for criterion, reply in tree["gradings"]:
        question = grader_prompt(TEMPLATE, prompt, response) + criterion_prompt(TEMPLATE, criterion)
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def test_committed_tokenizer_is_what_the_code_writes(tmp_path: Path):
    train_tokenizer(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes()


def test_ids(tokenizer):
    assert len(tokenizer) <= VOCAB_SIZE
    assert tokenizer.pad_id() == 0 == tokenizer.piece_to_id("<pad>")
    assert tokenizer.bos_id() == -1
    for symbol in ("<|im_start|>", "<|im_end|>", "\n", *SKELETON, *POINTS):
        assert len(tokenizer.encode(symbol)) == 1, symbol
        assert tokenizer.encode(symbol)[0] != tokenizer.unk_id()


def test_every_world_word_is_one_piece(tokenizer, trees):
    for tree in trees:
        texts = [tree["response"], *[criterion.criterion for criterion, _ in tree["gradings"]]]
        for text in [*texts, *[message["content"] for message in tree["prompt"]]]:
            assert len(tokenizer.encode(text)) == len(text.split())


@pytest.mark.parametrize(
    "text",
    ['Ünï  {"a": 1}\t ok \n\n\n end ', " lead", "a\r\nb", "", " ", "[5] Bring TWO towels!", "日本"],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chats_round_trip(tokenizer, trees):
    for tree in trees:
        for chat in chats(tree):
            text = render([{"role": "system", "content": "be kind ."}, *chat])
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prefix_and_rest_are_encoded_as_the_whole(tokenizer, trees):
    """Sampling and grading encode a prefix, then the rest: the pieces must be those of the whole."""
    for tree in trees:
        for chat in chats(tree):
            prefix = render(chat[:-1], add_generation_prompt=True)
            rest = chat[-1]["content"] + "<|im_end|>\n"
            assert prefix + rest == render(chat)
            assert tokenizer.encode(prefix) + tokenizer.encode(rest) == tokenizer.encode(prefix + rest)
        prefix = grader_prompt(TEMPLATE, tree["prompt"], tree["response"])
        for criterion, _ in tree["gradings"]:
            rest = criterion_prompt(TEMPLATE, criterion)
            assert tokenizer.encode(prefix) + tokenizer.encode(rest) == tokenizer.encode(prefix + rest)


def test_verdict_is_one_token_after_the_explanation(tokenizer, trees):
    verdicts = {tokenizer.encode(piece)[0] for piece in SKELETON[1:]}
    for tree in trees:
        for _, reply in tree["gradings"]:
            ids = tokenizer.encode(reply)
            assert ids[-1] in verdicts and ids[0] == tokenizer.encode(SKELETON[0])[0]
            assert len(ids) <= 16


def test_transformers_reads_it_alike(tokenizer, trees):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    for tree in trees[:10]:
        for chat in chats(tree):
            text = render(chat)
            assert theirs.apply_chat_template(chat, tokenize=False) == text
            assert theirs.encode(text) == tokenizer.encode(text)
