"""A checkpoint's tensors as stored, and the float model's weights that they stand for.

Which encoding a weight has is seen by its keys' suffixes and by the shapes and dtypes behind them; the configuration
(config.json's `quantization_config`, quantize_config.json, …) is asked for what these cannot say, and must agree.
An encoding is a module of this package that is called by its name, with

    METHODS                                    the `quant_method`s of configurations that mean it
    claims(stored: Stored) -> bool             whether the tensors of one weight are its own
    decode(stored: Stored) -> Weight           the weight; raises CorruptFile and Unsupported
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any, Protocol, cast

from nibblecast.converters.errors import CorruptFile, brief, located
from nibblecast.converters.ir import Loss, Tensor
from nibblecast.formats.encodings.unread import unread_codes

#: Beyond this a setting is no number of bits, or of elements in a group.
_LARGEST_SIZE = (1 << 31) - 1


def is_size(value: Any) -> bool:
    """Whether a setting is an integer that can be the size of something, or stand for one, as -1 does."""
    return type(value) is int and abs(value) <= _LARGEST_SIZE


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The tensors by key; `config` is the part of the configuration that is about quantization ({}: there is none),
    `architecture` the model's own (config.json). `values` are what a pickled state dict has by key beside tensors:
    numbers, texts, tuples of numbers, names of dtypes. `worked_out` is what an encoding finds out once for all weights,
    by the encoding's name."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    worked_out: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The configuration's name of the encoding; empty where there is none."""
        name = self.config.get("quant_method", "")
        return name if isinstance(name, str) else brief(name)


@dataclass(frozen=True, slots=True, eq=False)
class WeightTensors:
    """The tensors of one weight: those whose keys begin with `prefix`, by what follows it."""

    prefix: str
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        """The weight's name: the prefix, where it is a key itself, or else that of a module."""
        return self.prefix if self.prefix in self.checkpoint.tensors else f"{self.prefix}.weight"

    def get(self, suffix: str) -> Tensor | None:
        """The tensor `prefix + suffix`; None where there is none."""
        return self.checkpoint.tensors.get(self.prefix + suffix)

    def __getitem__(self, suffix: str) -> Tensor:
        """Likewise. Raises CorruptFile where there is none."""
        tensor = self.get(suffix)
        if tensor is None:
            raise CorruptFile(f"has no tensor '{self.prefix}{suffix}', without which it cannot be decoded")
        return tensor

    def setting(self, name: str, kind: type, default: Any) -> Any:
        """What the configuration has under that name. Raises CorruptFile where it is of another type, or an integer
        that is no size of anything."""
        value = self.checkpoint.config.get(name, default)
        if (type(value) is not kind and value is not default) or (type(value) is int and not is_size(value)):
            needed = "int of 32 bits" if kind is int else kind.__name__
            raise CorruptFile(f"has '{name}': {brief(value)} in its configuration, where {needed} is needed")
        return value


@dataclass(frozen=True, slots=True, eq=False)
class DecodedWeight:
    """A weight of the float model, and the suffixes of the tensors that made it; other tensors stay what they are."""

    tensor: Tensor
    made_of: tuple[str, ...]
    losses: tuple[Loss, ...] = ()


class _Encoding(Protocol):
    METHODS: frozenset[str]

    def claims(self, stored: WeightTensors) -> bool: ...

    def decode(self, stored: WeightTensors) -> DecodedWeight: ...


#: The ends of keys that encoded weights have, and the encodings that may be behind them, in the order in which
#: they are asked.
MARKERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        ".SCB": ("bitsandbytes.int8",),
        ".W_q": ("hqq.read",),
        ".bitmask": ("compressed_tensors.read",),
        ".quant_state.bitsandbytes__fp4": ("bitsandbytes.read",),
        ".quant_state.bitsandbytes__nf4": ("bitsandbytes.read",),
        ".qscale_weight": ("finegrained_fp8.read",),
        ".qweight": ("gptq.read", "awq.read"),
        ".scale": ("finegrained_fp8.read",),
        ".scales": ("mlx.read", "torchao.dynamic_activation_linear"),
        ".weight._data": ("quanto.read",),
        ".weight._data._data": ("quanto.read",),
        ".weight_packed": ("compressed_tensors.read",),
        ".weight_scale": ("compressed_tensors.read", "modelopt.read"),
        "_blocks": ("mxfp4.read",),
        "_scale_inv": ("finegrained_fp8.read",),
        "_weight_scale": ("modelopt.experts",),
    }
)
#: Of these, those that other tensors have as well.
_AMBIGUOUS = frozenset((".scale",))


def is_encoded(keys: Iterable[str]) -> bool:
    """Whether any of these keys is one that only encoded weights have."""
    markers = tuple(MARKERS.keys() - _AMBIGUOUS)
    return any(key.endswith(markers) for key in keys)


def decode_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[Loss]]:
    """The float model's tensors in the order of the file, and what was lost. Raises CorruptFile where tensors and
    configuration contradict each other, Unsupported for encodings that are only known by name."""
    weights: dict[str, tuple[str, DecodedWeight]] = {}
    made_of: set[str] = set()
    for key in checkpoint.tensors:
        for marker, names in MARKERS.items():
            prefix = key.removesuffix(marker)
            # an encoding may have several markers, of which one is enough
            if prefix != key and key not in made_of and (found := _weight(WeightTensors(prefix, checkpoint), names)):
                weights[key] = (prefix, found)
                stored = [prefix + suffix for suffix in found.made_of if prefix + suffix in checkpoint.tensors]
                for part in stored:  # what was read to check it is read again when it is wanted
                    checkpoint.tensors[part].release()
                made_of.update(stored)
                break
    tensors, losses = _in_order(checkpoint, weights, made_of)
    left = {key: tensor for key, tensor in checkpoint.tensors.items() if key not in weights and key not in made_of}
    if checkpoint.method and not weights:
        detail = (
            f"no tensor is recognised as quantized by quant_method '{checkpoint.method}': all are taken as they are "
            "stored, without quantization"
        )
        losses.append(Loss("", "reinterpreted", detail))
    elif unread := unread_codes(left):
        named = f"'{unread[0]}'" + (f" and {len(unread) - 1} more" if len(unread) > 1 else "")
        detail = (
            f"{named} look like codes with scales of an unknown encoding: they are taken as they are stored, without "
            "quantization"
        )
        losses.append(Loss("", "reinterpreted", detail))
    return tensors, losses


def _in_order(
    checkpoint: Checkpoint, weights: Mapping[str, tuple[str, DecodedWeight]], made_of: set[str]
) -> tuple[dict[str, Tensor], list[Loss]]:
    tensors: dict[str, Tensor] = {}
    losses: list[Loss] = []
    for key, stored in checkpoint.tensors.items():
        name, tensor = key, stored
        if key in weights:
            tensor = weights[key][1].tensor
            name = tensor.name
            losses += weights[key][1].losses
        elif key in made_of:
            continue
        if name in tensors:
            raise CorruptFile("is there twice: encoded and as it is", tensor=name)
        tensors[name] = tensor
    return tensors, losses


def _weight(stored: WeightTensors, names: tuple[str, ...]) -> DecodedWeight | None:
    method = stored.checkpoint.method
    for name in names:
        encoding = cast("_Encoding", import_module(f"nibblecast.formats.encodings.{name}"))
        with located(tensor=stored.name):
            if not encoding.claims(stored):
                continue
            if method and method not in encoding.METHODS:
                library = name.partition(".")[0]
                raise CorruptFile(f"its tensors are {library}'s, but its configuration says quant_method '{method}'")
            return encoding.decode(stored)
    return None
