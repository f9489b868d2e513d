"""What an encoding makes of a weight, and what the configuration then says: the way back from `checkpoint`.

An encoding that can be written is a module of this package that has, beside what reading takes,

    encode(weight: Tensor) -> Encoded                                   raises Unsupported for what it cannot hold
    configuration(weights: Mapping[str, Encoded], plain: Collection[str]) -> Configuration
                                                                        raises Unsupported where weights differ in what
                                                                        there is one of

Codes are never rounded anew: a weight whose codes and parameters do not fit as they are is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any, Protocol, cast

from nibblecast.converters.ir import Loss, Tensor

#: The layouts of `--opt layout=` that are encodings, and the module of each.
WRITABLE: Mapping[str, str] = MappingProxyType(
    {
        "awq": "awq.write",
        "compressed-tensors": "compressed_tensors.write",
        "gptq": "gptq.write",
        "mlx": "mlx.write",
        "torchao": "torchao.write",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A weight as it is stored: `stored` are plain tensors by key, `weight` what reading them gives: the same values,
    perhaps in other codes. `setting` is what the configuration says about it, for the encoding's own use. `losses` are
    those of values that are computed otherwise, as the encoding's library does."""

    weight: Tensor
    stored: Mapping[str, Tensor]
    setting: Any
    losses: tuple[Loss, ...] = ()


@dataclass(frozen=True, slots=True)
class Configuration:
    """What stands beside the tensors: `entries` of config.json, other JSON `files` by name, the `metadata` of the
    safetensors files; notes are for the user, a sentence each. `stored` are tensors whose contents depend on what is
    decided for the whole model: they replace those of the same keys, shapes and dtypes in `Encoded.stored`."""

    entries: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    notes: tuple[str, ...] = ()
    stored: Mapping[str, Tensor] = field(default_factory=dict)


class WritableEncoding(Protocol):
    """The functions that a module in `WRITABLE` has."""

    def encode(self, weight: Tensor) -> Encoded: ...

    def configuration(self, weights: Mapping[str, Encoded], plain: Collection[str]) -> Configuration:
        """`weights` are the encoded ones by name, `plain` the names of the others."""
        ...


def writable_encoding(layout: str) -> WritableEncoding:
    """The module that writes a layout, imported now."""
    return cast("WritableEncoding", import_module(f"nibblecast.formats.encodings.{WRITABLE[layout]}"))
