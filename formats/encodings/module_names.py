"""What names say about modules where tensors do not: which weights are no linear layers', and how a configuration tells
quantized modules from others.

Names are those of transformers' models: `<block>.<number>.<module>.weight` in a stack of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Tensor

#: The last parts of names that only embeddings have in transformers 5.23, where linear layers are replaced alone.
EMBEDDINGS = frozenset(
    (
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "position_embedding",
        "position_embeddings",
        "relative_attention_bias",
        "shared",
        "tok_embeddings",
        "token_embedding",
        "token_type_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    )
)
#: Those of the layer that computes logits.
HEADS = frozenset(("embed_out", "lm_head"))
_WEIGHT = ".weight"
_NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
_IN_BLOCK = re.compile(r"(?:(?P<stack>.*?)\.)?\d+\.(?P<module>.+)")


def last_part(module: str) -> str:
    """A module's own name."""
    return module.rpartition(".")[2]


def stack_of(module: str) -> str | None:
    """The name of the stack of blocks that a module is in; None where it is in none."""
    match = _IN_BLOCK.fullmatch(module)
    return match["stack"] or "" if match else None


def in_block(module: str) -> str:
    """A module's name within its block; empty where it is in none."""
    match = _IN_BLOCK.fullmatch(module)
    return match["module"] if match else ""


def linear_module(weight: Tensor) -> str:
    """The name of the linear layer that has a weight. Raises Unsupported for weights that are none: of another name
    than `<module>.weight`, of other than two axes, without elements, or an embedding's by their name."""
    module = weight.name.removesuffix(_WEIGHT)
    if module == weight.name:
        raise Unsupported("is not named '<module>.weight', as the weights of linear layers are", tensor=weight.name)
    if len(weight.shape) != 2 or not weight.size:
        raise Unsupported(f"has shape {weight.shape}, where a linear layer's matrix is needed", tensor=weight.name)
    if last_part(module) in EMBEDDINGS:
        raise Unsupported("is an embedding by its name, and only linear layers are encoded so", tensor=weight.name)
    return module


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules whose weights are `quantized`, and those of the `plain` ones that may be linear layers as well."""

    quantized: tuple[str, ...]
    plain: tuple[str, ...]

    @classmethod
    def of(cls, quantized: Collection[str], plain: Collection[str]) -> Modules:
        """Those of weights by name. What is an embedding, a head or a norm by its name is left out of the plain ones:
        no library takes it for a quantized layer."""
        return cls(tuple(_modules(quantized)), tuple(filter(_may_be_linear, _modules(plain))))

    def in_blocks(self) -> Modules:
        """Those of them that are in a stack of blocks."""
        return Modules(tuple(filter(in_block, self.quantized)), tuple(filter(in_block, self.plain)))

    def names_of_plain(self) -> list[str]:
        """Ends of names that all plain modules have and no quantized one: names within blocks where these tell them
        apart, else whole names."""
        return _told_apart(self.plain, self.quantized)

    def patterns_of_plain(self) -> dict[str, dict[str, Any]]:
        """Likewise as the negative patterns that gptqmodel and vLLM have in `dynamic`: a module whose name matches one
        from its beginning is plain."""
        return {rf"-:(.*\.)?{re.escape(name)}$": {} for name in self.names_of_plain()}

    def names_of_quantized(self) -> list[str]:
        """Likewise of the quantized modules, and no plain one has them."""
        return _told_apart(self.quantized, self.plain)


def _modules(names: Collection[str]) -> list[str]:
    return [name.removesuffix(_WEIGHT) for name in names if name.endswith(_WEIGHT)]


def _may_be_linear(module: str) -> bool:
    name = last_part(module)
    return not (name in EMBEDDINGS or name in HEADS or _NORM.search(name))


def _told_apart(modules: Collection[str], others: Collection[str]) -> list[str]:
    within = dict.fromkeys(map(in_block, modules))
    ambiguous = {name for name in within if not name or any(other.endswith(name) for other in others)}
    named = (module if in_block(module) in ambiguous else in_block(module) for module in modules)
    return list(dict.fromkeys(named))
