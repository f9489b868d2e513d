"""Under which keys the layout `packed` stores a model's tensors and their parameters."""

from __future__ import annotations

from typing import Any

from nibblecast.converters.ir import Model, Tensor
from nibblecast.converters.names import UniqueNames
from nibblecast.formats.safetensors.container import METADATA_KEY, is_unicode
from nibblecast.formats.safetensors.file_layout import KINDS
from nibblecast.formats.safetensors.packed_layout import described


class PackedKeys:
    """Gives every stored tensor its key: the model's tensors their names, parameters `NAME.scale` and so on, and one
    that is a tensor of the model as well (TFLite's blockwise scales) no second copy. A name that is not Unicode is
    none, and only the description has it."""

    def __init__(self, model: Model) -> None:
        #: What is stored for each of the model's tensors, by key.
        self.stored: dict[str, dict[str, Tensor]] = {name: {} for name in model}
        self._model = model
        self._names = {id(tensor): name for name, tensor in model.items()}
        self._free = UniqueNames([*model, METADATA_KEY], separator=":")
        self._keys: dict[str, str] = {}
        self.descriptions = {name: self._described(name, tensor) for name, tensor in model.items()}

    @property
    def say_nothing(self) -> bool:
        """Whether the descriptions tell nothing that the container does not: plain tensors of its own dtypes."""
        return all(
            tensor.dtype in KINDS
            and self.descriptions[name] == {"data": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
            for name, tensor in self._model.items()
        )

    def _described(self, name: str, tensor: Tensor) -> dict[str, Any]:
        return described(tensor, name, lambda stored, wish: self._key_of(name, stored, wish))

    def _key_of(self, owner: str, tensor: Tensor, wish: str) -> str:
        name = self._names.get(id(tensor))
        if name is not None:
            if name in self._keys:
                return self._keys[name]
            owner = wish = name
        if name is not None and name != METADATA_KEY and is_unicode(name):
            key = name
        else:
            key = self._free.fresh(wish.encode(errors="backslashreplace").decode())
        self.stored[owner][key] = tensor
        if name is not None:
            self._keys[name] = key
        return key
