"""`python -m srrl_jax.tinyworld` writes the committed rows and tokenizer anew."""

from pathlib import Path

from srrl_jax.tinyworld.rows import dump_rows, easy_rows, hard_rows
from srrl_jax.tinyworld.tokenizer import train_tokenizer

folder = Path(__file__).parent
(folder / "easy.jsonl").write_text(dump_rows(easy_rows()), encoding="utf-8")
(folder / "hard.jsonl").write_text(dump_rows(hard_rows()), encoding="utf-8")
train_tokenizer()
