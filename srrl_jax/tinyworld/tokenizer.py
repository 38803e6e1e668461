"""The tiny world's SentencePiece tokenizer and chat template."""

import io
import json
import re
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from srrl_jax.tinyworld.corpus import pretraining_tree

CHECKPOINT = Path(__file__).parent / "checkpoint"
GRADER_TEMPLATE = Path(__file__).parent / "grader.txt"
VOCAB_SIZE = 512
PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
# How a grader prompt shows the points of a criterion, one piece each.
POINTS = tuple(f"[{points}] " for points in range(-10, 11) if points)
# A verdict's JSON skeleton: after the explanation, the decision is one token.
SKELETON = ('{"explanation": "', '", "criteria_met": true}', '", "criteria_met": false}')

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def _words() -> list[str]:
    """Every word and mark of the world's text, with the space that follows it if there is one."""
    texts = ["system\nuser\nassistant\nsystem: user: assistant:"]
    texts += GRADER_TEMPLATE.read_text(encoding="utf-8").split("{conversation}")
    rng = Random("tokenizer")
    for _ in range(4000):
        tree = pretraining_tree(rng)
        texts += [message["content"] for message in tree["prompt"]] + [tree["response"]]
        for criterion, reply in tree["gradings"]:
            texts += [criterion.criterion, json.loads(reply)["explanation"]]
    tokens = {token for text in texts for token in re.findall(r"[a-z]+ ?|[.:?] ?", text)}
    return sorted(tokens - {"criterion"})


def train_tokenizer(directory: str | Path = CHECKPOINT) -> None:
    """Write `tokenizer.model` and `tokenizer_config.json` into `directory`; deterministic.

    A unigram model of at most 512 pieces in which every word of the world is one piece: id 0 is
    `<pad>`, `<|im_end|>` ends a turn, there is no beginning-of-sequence id, and bytes make any
    text encodable. The text is taken as it is (no normalization, newlines kept). A piece carries
    the space *after* its word, so that a word has one piece at the start of a line and within it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    words = _words()
    # The trainer starts from these candidates only: without them it would cut words in parts.
    candidates = sorted({*words, *"".join(words)})
    model = io.BytesIO()
    with TemporaryDirectory() as scratch:
        seeds = Path(scratch) / "seeds.tsv"
        lines = (f"{piece.replace(' ', SPACE)}\t100\n" for piece in candidates)
        seeds.write_text("".join(lines), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(word for word in words for _ in range(100)),
            seed_sentencepieces_file=str(seeds),
            model_writer=model,
            model_type="unigram",
            vocab_size=VOCAB_SIZE,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            treat_whitespace_as_suffix=True,
            pad_id=0,
            pad_piece=PAD,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            user_defined_symbols=[START, END, "\n", *(s.replace(" ", SPACE) for s in SKELETON + POINTS)],
            num_threads=1,
            minloglevel=2,
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    proto.trainer_spec.ClearField("seed_sentencepieces_file")  # a scratch path, new every time
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": 512,
        "pad_token": PAD,
        # config.json says qwen3, whose tokenizer class transformers would else take.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
