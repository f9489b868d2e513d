from __future__ import annotations

from pathlib import Path

import pytest

import nibblecast
from nibblecast import Model
from tests.formats.tflite.models import Load


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Writes bytes to a file of that name and loads it."""

    def load(content: bytes, name: str = "model.tflite") -> Model:
        path = tmp_path / name
        path.write_bytes(content)
        return nibblecast.load(path)

    return load
