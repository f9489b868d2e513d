"""GGUF files, put together byte for byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence

STRING, ARRAY, UINT32 = 8, 9, 4
F32, Q4_0, Q8_0 = 0, 2, 8


def string(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded


def number(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<II", UINT32, value)


def info(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def file(
    infos: Sequence[bytes],
    data: bytes = b"",
    values: Sequence[bytes] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensors, keys = counts or (len(infos), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(values) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data
