"""The tensors of .pt2 archives, as they are stored: raw storages that a JSON document describes, or pickles.

    now             data/weights/MODEL_weights_config.json and a record for each storage; data/constants likewise
    before          data/weights/MODEL.pt and data/constants/MODEL.pt, archives of torch.save (from torch 2.8 on)
    torch <= 2.7    serialized_state_dict.pt and serialized_constants.pt, the same (the oldest call them .json)

torch 2.13, which reads all of these: torch/export/pt2_archive/_package.py and torch/export/__init__.py (load).
Tensors of classes that wrap others, and whole archives, are pickles; they are read without being executed, as all are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nibblecast.converters.errors import CorruptFile, Unsupported, brief, located
from nibblecast.converters.input.json_object import json_object
from nibblecast.converters.ir import Loss
from nibblecast.formats.pytorch.exported.program import dtype_of, entries, fixed_size, fixed_sizes, text_of
from nibblecast.formats.pytorch.pickle.archive import OLD_PROGRAM, Archive
from nibblecast.formats.pytorch.pickle.files import ZIP_MAGIC, saved_value
from nibblecast.formats.pytorch.pickle.globals import view_of
from nibblecast.formats.pytorch.pickle.limits import LEAF, Limits
from nibblecast.formats.pytorch.pickle.records import Storage, StridedTensor, SubclassTensor, is_tensor, shortened

_STRIDED = 7  # schema.Layout
_MODELS, _JSON = "models/", ".json"
_AOTINDUCTOR = "data/aotinductor/"


@dataclass(slots=True, eq=False)
class ProgramTensors:
    """One program of an archive: its JSON, and its tensors by their names in the state dict or among the constants."""

    model: str
    program: bytes
    tensors: dict[str, StridedTensor | SubclassTensor] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)


def payloads(archive: Archive, limits: Limits) -> Iterator[ProgramTensors]:
    """The programs of an archive. Raises CorruptFile for damage, Unsupported where there is only machine code."""
    if OLD_PROGRAM in archive:
        found = ProgramTensors("", archive.bytes_of(OLD_PROGRAM))
        for name in ("serialized_state_dict", "serialized_constants"):
            record = next((n for n in (f"{name}.pt", f"{name}.json") if n in archive), f"{name}.pt")
            _read_pickles(found, archive, record, limits)
        yield found
        return
    models = [name[len(_MODELS) : -len(_JSON)] for name in archive.entries if name.startswith(_MODELS)]
    models = [model for model in models if f"{_MODELS}{model}{_JSON}" in archive]
    if not models:
        if any(name.startswith(_AOTINDUCTOR) for name in archive.entries):
            raise Unsupported(
                "is a package of AOTInductor, which has machine code instead of a program: "
                "save the exported program itself with torch.export.save"
            )
        raise CorruptFile("has no program below models/: it is truncated, or not written by torch.export.save")
    for model in models:
        found = ProgramTensors(model, archive.bytes_of(f"{_MODELS}{model}{_JSON}"))
        for kind in ("weights", "constants"):
            folder = f"data/{kind}/"
            if f"{folder}{model}.pt" in archive:
                _read_pickles(found, archive, f"{folder}{model}.pt", limits)
            else:
                _read_storages(found, archive, folder, f"{folder}{model}_{kind}_config.json", limits)
        yield found


def _read_storages(found: ProgramTensors, archive: Archive, folder: str, config: str, limits: Limits) -> None:
    text = archive.bytes_of(config)
    limits.read += len(text)
    document = json_object(text, f"its record {shortened(config)}")
    pickled: dict[str, StridedTensor | SubclassTensor] = {}  # several tensors may be in one record
    for name, value in entries(document.get("config"), "config").items():
        meta = entries(value, name)
        path = text_of(meta.get("path_name"), "path_name")
        if "/" in path or ".." in path:
            raise CorruptFile(f"has a tensor in the record {brief(path)}, which is not a plain name", tensor=name)
        with located(tensor=name):
            if meta.get("tensor_meta") is None:
                detail = f"it is an object of TorchScript or Python ({brief(path)}), not a tensor"
                found.losses.append(Loss(name, "dropped", detail))
            elif meta.get("use_pickle"):
                if path not in pickled:
                    pickled[path] = _pickled(archive, folder + path, limits)
                found.tensors[name] = pickled[path]
            else:
                found.tensors[name] = _strided(archive, folder + path, entries(meta["tensor_meta"], "tensor_meta"))


def _strided(archive: Archive, record: str, meta: dict[str, Any]) -> StridedTensor:
    if meta.get("layout") != _STRIDED:
        raise Unsupported(f"is sparse (layout {brief(meta.get('layout'))}): only dense tensors are read")
    data, dtype = archive.record(record), dtype_of(meta.get("dtype"))
    shape, strides = (fixed_sizes(meta.get(key), key) for key in ("sizes", "strides"))
    if data.nbytes == 0 and 0 not in shape:
        raise Unsupported("has no elements in the file: the program was exported with fake tensors")
    storage = Storage(record, None, data.nbytes, data)
    return view_of(storage, fixed_size(meta.get("storage_offset"), "storage_offset"), shape, strides, dtype)


def _pickled(archive: Archive, record: str, limits: Limits) -> StridedTensor | SubclassTensor:
    value = saved_value(Archive.open(archive.record(record)), limits)
    if not is_tensor(value):
        raise Unsupported(f"is not a tensor but {type(value).__name__} in the pickle {brief(record)}")
    return value


def _read_pickles(found: ProgramTensors, archive: Archive, record: str, limits: Limits) -> None:
    data = archive.record(record)
    if data.nbytes == 0:  # no constants
        return
    if data.read(0, len(ZIP_MAGIC)).tobytes() != ZIP_MAGIC:
        raise Unsupported(
            f"its record {brief(record)} is not an archive of torch.save: load the program and save it again"
        )
    values = saved_value(Archive.open(data), limits)
    if not isinstance(values, dict):
        raise CorruptFile(f"its record {brief(record)} has no tensors by name, but {type(values).__name__}")
    limits.spend(LEAF * len(values))
    for name, value in values.items():
        if not isinstance(name, str):
            raise CorruptFile(f"its record {brief(record)} has a tensor without a name: it is damaged")
        if is_tensor(value):
            found.tensors[name] = value
        else:
            found.losses.append(Loss(name, "dropped", f"it is an object of {type(value).__name__}, not a tensor"))
