"""Conversations of HealthBench through the official Qwen3 chat template."""

import pytest

from srrl_jax.checkpoints.tokenizer import load_tokenizer
from srrl_jax.data import load_examples

END, THINK = "<|im_end|>\n", "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return load_tokenizer(shared_data / "qwen3-tokenizer")


@pytest.fixture(scope="module")
def rows(shared_data):
    return load_examples(shared_data / "healthbench" / "hard.jsonl")


def by_hand(messages) -> str:
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}{END}" for turn in messages)
    return turns + "<|im_start|>assistant\n"


@pytest.mark.parametrize("system", [None, "You are careful."])
def test_every_turn_is_rendered_in_order_with_thinking_on_and_off(tokenizer, rows, system):
    several = 0
    for example in rows:
        messages = [turn for turn in example.prompt if "</think>" not in turn["content"]]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        # The template trims newlines around what the assistant said.
        told = [
            turn | {"content": turn["content"].strip("\n")} if turn["role"] == "assistant" else turn
            for turn in messages
        ]
        assert tokenizer.render(messages, thinking=True) == by_hand(told)
        assert tokenizer.render(messages, thinking=False) == by_hand(told) + THINK
        several += len(example.prompt) > 2
    assert several > 20


def test_control_tokens_stand_only_where_the_template_puts_them(tokenizer, rows):
    start, end = 151644, 151645
    for example in rows[:20]:
        ids = tokenizer.encode(tokenizer.render(list(example.prompt), thinking=False))
        assert ids.count(start) == len(example.prompt) + 1
        assert ids.count(end) == len(example.prompt)
        assert ids.count(151667) == ids.count(151668) == 1
        assert tokenizer.decode(ids[1:3]).strip() == "user"
