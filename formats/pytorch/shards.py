"""Folders of PyTorch files that are one model: shards with an index, or the file that transformers or PEFT would take.

    pytorch_model.bin.index.json    transformers (5.23, modeling_utils.py), with pytorch_model-00001-of-00002.bin, …
    pytorch_model.bin               transformers; adapter_model.bin is PEFT's
    consolidated.00.pth             Meta's and Mistral's

A folder may have others beside them: training_args.bin, optimizer.pt, rng_state.pth. Where none has such a name, a lone
.bin, .pt or .pth file is the model.
"""

from __future__ import annotations

from pathlib import Path

from nibblecast.converters.errors import Unsupported, located
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.encodings.shards import Shards, owners, shards_of
from nibblecast.formats.pytorch.modules.state_dict import StateDict, as_saved, strip_wrappers
from nibblecast.formats.pytorch.pickle.archive import CONSTANTS, Archive
from nibblecast.formats.pytorch.pickle.files import ZIP_MAGIC, legacy_value, saved_value
from nibblecast.formats.pytorch.pickle.limits import Limits

_INDEX = "*.bin.index.json"
_NAMED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "adapter_model.bin", "consolidated.*.pth")
_LONE = ("*.bin", "*.pt", "*.pth")


def checkpoint_files(folder: Path) -> Shards:
    """The files of the model in `folder`. Raises CorruptFile for an index that lies, Unsupported where nothing tells
    which of several files is the model."""
    shards = shards_of(folder, _INDEX, (*_NAMED, *_LONE))
    first = shards.files[0] if shards.files else folder
    if shards.index is None and len(shards.files) > 1 and not any(first.match(pattern) for pattern in _NAMED):
        names = f"{first.name}, {shards.files[1].name}{', …' if len(shards.files) > 2 else ''}"
        raise Unsupported(f"has {len(shards.files)} files ({names}), and no index says which are the model: name one")
    return shards


def together(shards: Shards, limits: Limits) -> StateDict:
    """What is saved in several files, as if it were in one. Raises CorruptFile for tensors in two of them and for those
    that are not where the index says, Unsupported for programs among them."""
    parts = {file: _opened(file, limits) for file in shards.files}
    taken, losses = owners(shards, ((file, part.leaves) for file, part in parts.items()))
    found = StateDict(losses=losses)
    for file, part in parts.items():
        found.leaves |= {key: leaf for key, leaf in part.leaves.items() if taken.get(key) == file}
        found.settings |= part.settings
        found.classes |= part.classes
        found.values |= part.values
        found.losses += part.losses
    strip_wrappers(found)
    return found


def _opened(path: Path, limits: Limits) -> StateDict:
    with located(path=path):
        file = MappedFile.open(path)
        if file.view[: len(ZIP_MAGIC)].tobytes() != ZIP_MAGIC:
            return as_saved(legacy_value(file, limits), limits)
        archive = Archive.open(file)
        if archive.is_exported or CONSTANTS in archive:
            raise Unsupported("is a program, and one of several files here: name it")
        return as_saved(saved_value(archive, limits), limits)
