"""The tokens of a step's completions on disk, from which `replay` computes the step again."""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath

from srrl_jax.sampling import Completion


def tokens_path(run_dir: epath.Path, step: int) -> epath.Path:
    """Where the tokens of a step's completions are kept."""
    return run_dir / "tokens" / f"step_{step:06d}.npz"


def write_tokens(path: epath.Path, groups: Sequence[Sequence[Completion]]) -> None:
    """A step's completions as the sampler gave them, in about 6 bytes a token.

    Fields: `lengths` int32 [N, G]; `tokens` int32 and `logprobs` float32, all completions in a row.
    """
    flat = [completion for group in groups for completion in group]
    write_npz(
        path,
        lengths=np.array([[len(c.tokens) for c in group] for group in groups], np.int32),
        tokens=np.concatenate([c.tokens for c in flat]),
        logprobs=np.concatenate([c.logprobs for c in flat]),
    )


def read_tokens(path: epath.Path, truncated: Sequence[bool]) -> list[list[Completion]]:
    """What `write_tokens` wrote; `truncated` for each completion in order, from the samples."""
    with np.load(io.BytesIO(path.read_bytes())) as file:
        lengths, tokens, logprobs = file["lengths"], file["tokens"], file["logprobs"]
    ends = np.cumsum(lengths)[:-1]
    flat = map(Completion, np.split(tokens, ends), np.split(logprobs, ends), truncated)
    return [[next(flat) for _ in row] for row in lengths]


def write_npz(path: epath.Path, **arrays: np.ndarray) -> None:
    """Compressed arrays in a file, whose folder is made."""
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.write_bytes(buffer.getvalue())
