"""Fixtures that every room uses."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rows, tokenizers and golden files that is kept outside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the shared data folder beside the checkout ({SHARED_DATA.name}/ is not there)")
    return SHARED_DATA
