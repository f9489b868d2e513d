"""What the configuration of compressed-tensors says about weights (0.20, quantization/quant_args.py, quant_config.py).

`config_groups` have one scheme each, for the modules that its targets name by name, by class or by regular expression.
Classes are not in a checkpoint's tensors, and a file's regular expressions are not run: where no target is the weight's
name, its scheme is the one that its tensors fit, of those groups that are not for modules by name only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nibblecast.converters.errors import CorruptFile, brief
from nibblecast.converters.ir import blocked, grid_shape, per_tensor
from nibblecast.formats.encodings.checkpoint import Checkpoint, WeightTensors, is_size

#: Layouts that are known by name only.
UNREAD = frozenset(("marlin-24", "sparse-24-bitmask", "sparse-bitmask"))
#: Every weight is looked for in those that name none.
_MOST_GROUPS = 1024
#: Names that say nothing about the layout of one weight.
_ANY = frozenset(("", "mixed-precision"))
#: The dtypes of scales in the layouts whose scales are not of the model's dtype.
SCALE_DTYPES = MappingProxyType(
    {
        "mxfp4-pack-quantized": "torch.uint8",
        "mxfp8-quantized": "torch.uint8",
        "nvfp4-pack-quantized": "torch.float8_e4m3fn",
    }
)


@dataclass(frozen=True, slots=True)
class ConfigGroup:
    """How some weights are quantized: bits of a code, "int" or "float", "tensor", "channel", "group", "tensor_group" or
    "block", inputs in a group, rows and columns of a block, and the name of the layout (empty: any)."""

    bits: int
    kind: str
    strategy: str
    group: int
    block: tuple[int, int]
    layout: str

    def block_shape(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
        """The block shape of a weight of `shape` whose scales have shape `scales`; None where it is not of this
        scheme."""
        if self.strategy == "tensor":
            return per_tensor(shape) if all(size == 1 for size in scales) else None
        if self.strategy == "channel":
            blocks = blocked(shape, len(shape) - 1, max(1, shape[-1]))
        elif self.strategy in ("group", "tensor_group") and self.group > 0:
            blocks = blocked(shape, len(shape) - 1, self.group)
        elif self.strategy == "block" and min(self.block) > 0:
            blocks = (*(1,) * (len(shape) - 2), *self.block)
        else:
            return None
        blocks = tuple(min(block, max(1, size)) for block, size in zip(blocks, shape, strict=True))
        grid = grid_shape(shape, blocks)
        return blocks if scales in (grid, grid[:-1] if grid[-1] == 1 else grid) else None


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How a weight is written: the scheme, and whether it has no zero points."""

    scheme: ConfigGroup
    symmetric: bool = True

    def group(self, targets: list[str]) -> dict[str, Any]:
        """The entry of `config_groups` for weights of this kind, as compressed-tensors 0.20 writes it."""
        scheme = self.scheme
        weights: dict[str, Any] = {
            "num_bits": scheme.bits,
            "type": scheme.kind,
            "symmetric": self.symmetric,
            "group_size": scheme.group if scheme.group > 0 else None,
            "strategy": scheme.strategy,
            "dynamic": False,
        }
        if scheme.strategy == "block":
            weights["block_structure"] = list(scheme.block)
        if scheme.layout in SCALE_DTYPES:
            weights["scale_dtype"] = SCALE_DTYPES[scheme.layout]
        nothing = {"input_activations": None, "output_activations": None}
        return {"targets": targets, "weights": weights, **nothing, "format": scheme.layout}


def schemes(stored: WeightTensors, layouts: frozenset[str]) -> tuple[ConfigGroup, ...]:
    """The schemes of the configuration that are of one of `layouts`; empty where there is no configuration. Raises
    CorruptFile where it has some, but none of these, or means that the weight is not quantized."""
    groups = _groups(stored.checkpoint)
    if stored.prefix in groups.ignored:
        raise CorruptFile("is among those that its configuration ignores, but has quantized tensors")
    names = groups.by_target.get(stored.prefix, groups.general)
    weights = [scheme for name in names if (scheme := groups.scheme(name)) is not None]
    fitting = tuple(scheme for scheme in dict.fromkeys(weights) if scheme.layout in layouts or scheme.layout in _ANY)
    if groups.entries is not None and not fitting:
        told = ", ".join(sorted({scheme.layout for scheme in weights})) or "none"
        raise CorruptFile(f"has tensors of {' or '.join(sorted(layouts))}, but its configuration says {told}")
    return fitting


def layout_names(stored: WeightTensors) -> frozenset[str]:
    """All names of layouts in the configuration."""
    return _groups(stored.checkpoint).layouts


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """The groups of a configuration by name (None: there is none), looked through once for all weights: those that name
    a module, and those that are for any other, which are all where none is; the names of modules that are not
    quantized, and of layouts."""

    entries: Mapping[str, Any] | None
    default: Any
    ignored: frozenset[str]
    by_target: Mapping[str, Sequence[str]]
    general: Sequence[str]
    layouts: frozenset[str]
    schemes: dict[str, ConfigGroup | None] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Groups:
        """Those of a checkpoint. Raises CorruptFile for what is no object of groups, or too many."""
        config = checkpoint.config
        groups, ignored = config.get("config_groups"), config.get("ignore")
        if groups is None:
            return cls(None, None, frozenset(), {}, (), frozenset(_strings([config.get("format")])))
        if not isinstance(groups, dict):
            raise CorruptFile(f"config_groups of its configuration must be an object, got {brief(groups)}")
        if len(groups) > _MOST_GROUPS:
            raise CorruptFile(f"has {len(groups)} config_groups in its configuration: {_MOST_GROUPS} are the most")
        by_target: dict[str, dict[str, None]] = {}
        for name, group in groups.items():
            for target in _targets(group):
                by_target.setdefault(target, {})[name] = None
        values = [config.get("format"), *(_of(group, "format") for group in groups.values())]
        return cls(
            groups,
            config.get("format"),
            frozenset(_strings(ignored)),
            {target: tuple(names) for target, names in by_target.items()},
            [name for name, group in groups.items() if not _only_names(group, checkpoint)] or list(groups),
            frozenset(_strings(values)),
        )

    def scheme(self, name: str) -> ConfigGroup | None:
        """The scheme of a group; None where it is about activations only."""
        if name not in self.schemes:
            self.schemes[name] = _scheme(name, _of(self.entries, name), self.default)
        return self.schemes[name]


def _groups(checkpoint: Checkpoint) -> _Groups:
    key = "compressed-tensors"
    if key not in checkpoint.worked_out:
        checkpoint.worked_out[key] = _Groups.of(checkpoint)
    found: _Groups = checkpoint.worked_out[key]
    return found


def _only_names(group: Any, checkpoint: Checkpoint) -> bool:
    """Whether all targets are names of modules, so that the group is for no other. Names without a dot could be those
    of classes, unless there are tensors of such a module."""
    targets = _of(group, "targets")
    return isinstance(targets, list) and all(
        isinstance(target, str)
        and not target.startswith("re:")
        and ("." in target or f"{target}.weight_scale" in checkpoint.tensors)
        for target in targets
    )


def _targets(group: Any) -> Iterator[str]:
    yield from _strings(_of(group, "targets"))


def _strings(values: Any) -> Iterator[str]:
    yield from (value for value in (values if isinstance(values, list) else ()) if isinstance(value, str))


def _scheme(name: str, group: Any, default: Any) -> ConfigGroup | None:
    """The scheme of a group; None where it is about activations only."""
    weights = _of(group, "weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise CorruptFile(f"config group '{name}': weights must be an object, got {brief(weights)}")
    layout = _of(group, "format") or default or ""
    bits, kind = _of(weights, "num_bits", 8), _of(weights, "type", "int")
    size, block = _of(weights, "group_size"), _of(weights, "block_structure")
    strategy = _of(weights, "strategy") or _implied_strategy(size)
    sizes = block if isinstance(block, list) and len(block) == 2 else [0, 0]
    if isinstance(block, str):  # "128x128", before 0.10
        sizes = [int(part) if part.isdecimal() and len(part) < 9 else 0 for part in block.split("x", 1)]
    counts = [bits, -1 if size is None else size, *sizes]
    if not all(is_size(count) for count in counts) or len(counts) != 4 or not 1 <= bits <= 32:
        raise CorruptFile(
            f"config group '{name}': bits, group size and block must be numbers, got {brief((bits, size, block))}"
        )
    for key, text in (("format", layout), ("type", kind), ("strategy", strategy)):
        if not isinstance(text, str):
            raise CorruptFile(f"has the {key} {brief(text)} in '{name}' of its configuration, where a name is needed")
    return ConfigGroup(bits, kind.lower(), strategy.lower(), counts[1], (counts[2], counts[3]), layout)


def _implied_strategy(size: Any) -> str:
    """Where the strategy is left out: groups of that size, or all inputs of a channel for -1."""
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _of(value: Any, key: str, default: Any = None) -> Any:
    found = value.get(key) if isinstance(value, Mapping) else None
    return default if found is None else found
