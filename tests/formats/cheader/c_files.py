"""A small header to read back, and changes of its text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from nibblecast.converters.ir import Model, Tensor
from nibblecast.formats.cheader.reader import CHeaderReader
from tests.formats.cheader.c_harness import model_of, write
from tests.formats.cheader.c_zoo import dtype_of, floats, integers, random_codes

LAYOUTS = ("split", "header")


def read(path: Path) -> Model:
    return CHeaderReader().read(path)


def write_small(folder: Path, **options: Any) -> tuple[Path, Model]:
    """A header of quantized and plain tensors, with the lines of each array that there can be."""
    rng = np.random.default_rng(0)
    shape = (6, 40)
    quantized = random_codes(
        "w",
        shape,
        dtype_of("int4"),
        rng,
        scale=floats((6, 2), rng),
        block_shape=(1, 20),
        zero_point=integers((6, 2), rng),
    )
    plain = [random_codes(name, (41,), dtype_of(name), rng) for name in ("uint8", "int8", "int16", "uint32", "int64")]
    reals = [Tensor.from_array(n, rng.normal(0, 1, (5, 9)).astype(n)) for n in ("float16", "float32", "float64")]
    model = model_of(quantized, *plain, *reals)
    write(model, folder / "m.h", **options)
    return folder / "m.h", model


def rewritten(header: Path, change) -> Path:
    """The header, after the text of its .c file was changed."""
    source = header.with_suffix(".c")
    text = source.read_bytes().decode("latin-1")
    changed = change(text)
    assert changed != text
    source.write_bytes(changed.encode("latin-1"))
    return header


def of_array(name: str, change):
    """A change of what is between the braces of one array."""

    def apply(text: str) -> str:
        return re.sub(
            rf"(\b{name}\[\w*\][^={{;]*= \{{)(.*?)(\}};)", lambda m: m[1] + change(m[2]) + m[3], text, flags=re.S
        )

    return apply
