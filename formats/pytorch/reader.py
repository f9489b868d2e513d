"""PyTorch files -> Model: what was saved in them as a flat state dict, headers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from nibblecast.converters.errors import CorruptFile, located
from nibblecast.converters.interfaces import option
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.converters.metadata import Metadata
from nibblecast.converters.storage import InMemory, MappedFile
from nibblecast.formats.encodings.checkpoint import Checkpoint, decode_checkpoint, is_encoded
from nibblecast.formats.encodings.configuration import model_config, quantization_config
from nibblecast.formats.encodings.shards import Shards
from nibblecast.formats.pytorch.modules.batch_norm import batch_norm_modules, fold_batch_norms
from nibblecast.formats.pytorch.modules.fake_quantizers import quantize_weights
from nibblecast.formats.pytorch.modules.packed_parameters import unpack_parameters
from nibblecast.formats.pytorch.modules.state_dict import Leaf, StateDict, state_dict_of
from nibblecast.formats.pytorch.modules.tensors import take, tensor_of
from nibblecast.formats.pytorch.pickle.archive import CONSTANTS, Archive
from nibblecast.formats.pytorch.pickle.files import ZIP_MAGIC, legacy_value, saved_value
from nibblecast.formats.pytorch.pickle.limits import ENTRY, Limits
from nibblecast.formats.pytorch.pickle.records import StridedTensor, SubclassTensor
from nibblecast.formats.pytorch.shards import checkpoint_files, together

_NOT_FOLDED = (
    "its scale was trained with the batch norm folded into it, and it is not folded: add --opt fold-batch-norm=true"
)


@dataclass(frozen=True, slots=True)
class PyTorchOptions:
    """What the file may not say."""

    bits: int | None = option(
        None, "bits of weights that were trained with fake quantization, where the file lacks them"
    )
    fold_batch_norm: bool = option(False, "multiply the batch norm of QAT's ConvBn modules into the weight before it")
    int4_cpu_layout: Literal["avx512", "avx2", "generic"] = option(
        "avx512", "the kind of CPU on which torchao packed int4 weights for CPUs, which no file records"
    )


class PyTorchReader:
    """Reads .pt, .pth, .bin, .ckpt and .pt2 files, and folders whose model is in one of them or in shards."""

    options: ClassVar[type] = PyTorchOptions

    def read(self, path: Path, options: PyTorchOptions = PyTorchOptions()) -> Model:
        """The tensors as the float model's state dict names them. Raises CorruptFile for damage and for pickles that
        name what they must not, Unsupported for what is valid but not handled."""
        files = checkpoint_files(path) if path.is_dir() else Shards((path,))
        limits = Limits(sum(map(_size, files.files)))
        if files.index is not None or len(files.files) > 1:
            return _model(together(files, limits), "", path, options, limits)
        with located(path=files.files[0]):
            return _of_file(files.files[0], path, options, limits)


def _size(file: Path) -> int:
    """The bytes of a file; 0 for one that cannot be opened, which is said when it is."""
    try:
        return file.stat().st_size
    except (OSError, ValueError):
        return 0


def _of_file(name: Path, path: Path, options: PyTorchOptions, limits: Limits) -> Model:
    """What is in the file `name`, of the model that is called by `path`: the file itself, or its folder."""
    file = MappedFile.open(name)
    if file.view[: len(ZIP_MAGIC)].tobytes() != ZIP_MAGIC:
        found = state_dict_of(legacy_value(file, limits), limits)
        return _model(found, "legacy file", path, options, limits)
    archive = Archive.open(file)
    if archive.is_exported:
        return _program(archive, path, options, limits)
    found = state_dict_of(saved_value(archive, limits), limits)
    if CONSTANTS not in archive:
        return _model(found, "", path, options, limits)
    # what torch.jit.freeze has taken for constants, as the code calls it
    constants = saved_value(archive, limits, CONSTANTS, "constants/")
    if isinstance(constants, tuple):
        limits.spend(ENTRY * len(constants))
        values = {f"CONSTANTS.c{number}": value for number, value in enumerate(constants)}
        found.leaves |= state_dict_of(values, limits).leaves
    found.losses.append(Loss("", "dropped", "the code of its TorchScript modules"))
    return _model(found, "TorchScript", path, options, limits)


def _program(archive: Archive, path: Path, options: PyTorchOptions, limits: Limits) -> Model:
    """The weights of an exported program, with what its graph says."""
    from nibblecast.formats.pytorch.exported.read import read_exported  # a state dict needs none of it

    program = read_exported(archive, limits)
    tensors, losses = dict(program.tensors), list(program.losses)
    for name, value in program.wrapped.items():
        tensors[name], more = _tensor(name, value, options, limits)
        losses += more
    metadata = Metadata(
        "pytorch", program.producer, path, program.operators, program.inputs, program.outputs, program.opsets
    )
    return Model(tensors, metadata, program.graph, losses=tuple(losses))


def _model(found: StateDict, producer: str, path: Path, options: PyTorchOptions, limits: Limits) -> Model:
    unpack_parameters(found, limits)
    losses = found.losses
    tensors = {}
    for name, leaf in found.leaves.items():
        take(limits, name, leaf)
        tensors[name], more = _tensor(name, leaf, options, limits)
        losses += more
    if path.is_dir() or is_encoded(tensors):  # what lies beside a lone file may belong to another one
        folder = path if path.is_dir() else path.parent
        checkpoint = Checkpoint(tensors, quantization_config(folder), model_config(folder), found.values)
        tensors, more = decode_checkpoint(checkpoint)
        losses += more
        producer = producer or checkpoint.method
    if options.fold_batch_norm:
        tensors, more = fold_batch_norms(tensors, found.settings)
        losses += more
    else:
        losses += [Loss(f"{m}.weight", "reinterpreted", _NOT_FOLDED) for m in batch_norm_modules(tensors)]
    tensors, more = quantize_weights(tensors, found.settings, options.bits, limits)
    return Model(tensors, Metadata("pytorch", producer, path), losses=(*losses, *more))


def _tensor(name: str, leaf: Leaf, options: PyTorchOptions, limits: Limits) -> tuple[Tensor, Sequence[Loss]]:
    with located(tensor=name):
        if isinstance(leaf, SubclassTensor):
            from nibblecast.formats.encodings.torchao.read import decoded  # only files that have such tensors need it
            from nibblecast.formats.pytorch.modules.tensor_subclasses import wrapped

            return decoded(name, wrapped(name, leaf, limits), cpu=options.int4_cpu_layout)
        if isinstance(leaf, StridedTensor):
            return tensor_of(name, leaf), ()
        if isinstance(leaf, np.ndarray):
            elements = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)  # the pickle's own, where they lie so
            return Tensor(name, leaf.shape, leaf.dtype, InMemory(elements)), ()
    raise CorruptFile(f"is not a tensor but {type(leaf).__name__}", tensor=name)
