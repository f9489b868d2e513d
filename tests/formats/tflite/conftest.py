from __future__ import annotations

from pathlib import Path

import pytest

import converters
from converters import Model
from tests.formats.tflite.models import Load


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Writes bytes to a file of that name and loads it."""

    def load(content: bytes, name: str = "model.tflite") -> Model:
        path = tmp_path / name
        path.write_bytes(content)
        return converters.load(path)

    return load
