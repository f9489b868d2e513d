"""The files that a model comes from: as an array of their own, and as what the C depends on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nibblecast.converters.errors import UsageError
from nibblecast.converters.ir import Model, Tensor
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.cheader.arrays import Arrangement, Array


def model_array(model: Model, arrangement: Arrangement) -> Array:
    """The source file, byte for byte. Raises UsageError when the model does not come from exactly one file."""
    source = model.metadata.source
    if source is None or not source.is_file():
        raise UsageError("model-array needs a model that is one file: leave the option out")
    others = source_files(model)[1:]
    if others:
        raise UsageError(f"model-array needs a model that is one file, but some of it lies in {others[0].name}")
    file = MappedFile.open(source)
    whole = Tensor(source.name, (file.view.size,), np.dtype(np.uint8), file.range(0, file.view.size))
    return arrangement.bytes_of(whole, "model")


def source_files(model: Model) -> list[Path]:
    """The file that was read, and those beside it that hold its data."""
    source = [] if model.metadata.source is None else [model.metadata.source]
    stored = (data for tensor in model.values() for data in tensor.stored())
    mapped = (file.path for data in stored for file in data.files())
    distinct = {path.resolve(): path for path in (*mapped, *source)}  # the source last: as the user spelled it
    return [*source, *(path for path in distinct.values() if path not in source)]
