"""What the generated C decodes is what the IR decodes, bit for bit, under every compiler and standard."""

from __future__ import annotations

import pytest

from tests.formats.cheader.c_harness import MODES, assert_same_values, walked, write
from tests.formats.cheader.c_zoo import ZOO

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", ["split", "header"])
@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("mode", MODES)
def test_values(tmp_path, mode, kind, layout):
    model = ZOO[kind]()
    files = write(model, tmp_path / "weights.h", layout=layout)
    assert_same_values(walked(mode, files, "weights"), model)
