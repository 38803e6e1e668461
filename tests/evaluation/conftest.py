"""What tests of several commands share."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def teacher_file(tmp_path):
    """Writes the YAML of a teacher at a stand-in endpoint: (url, model, **settings) -> path."""

    def write(url: str, model: str, **settings) -> Path:
        path = tmp_path / "teacher.yaml"
        common = {"key_env": "TEACHER_KEY", "cache": str(tmp_path / "cache.sqlite"), "backoff": 0.001}
        path.write_text(yaml.safe_dump({"base_url": url, "model": model} | common | settings))
        return path

    return write
