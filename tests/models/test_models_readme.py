"""The README's example of using the model alone."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "srrl_jax" / "models" / "README.md"


def test_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
