"""From a file to the Python value that was saved in it, its tensors as views of the file.

Three containers hold pickles: ZIP archives (torch >= 1.6, TorchScript included), the sequence of pickles before that,
and none: a bare pickle. .pt2 archives (torch.export) hold none; `formats.pytorch.exported` reads them.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.pytorch.pickle.archive import Archive
from nibblecast.formats.pytorch.pickle.dtypes import STORAGES
from nibblecast.formats.pytorch.pickle.limits import Limits
from nibblecast.formats.pytorch.pickle.records import Global, Storage, TorchDtype, described
from nibblecast.formats.pytorch.pickle.unpickler import Unpickler

ZIP_MAGIC = b"PK\x03\x04"

_PROTOCOL = b"\x80"  # the opcode with which all pickles of PyTorch begin
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_TAR_MAGIC = (257, b"ustar")
_LONGEST_STORAGE_KEY = 1 << 10
_MOST_ELEMENTS = 1 << 63


def saved_value(archive: Archive, limits: Limits, pickle: str = "data.pkl", folder: str = "data/") -> Any:
    """What the record `pickle` of an archive holds; the storages are records in `folder`."""
    order = archive.bytes_of("byteorder") if "byteorder" in archive else b"little"
    if order != b"little":
        raise Unsupported(f"was saved with the byte order {brief(order)}: only little is read")
    storages: dict[str, Storage] = {}

    def storage(identifier: Any) -> Storage:
        key, dtype, count, _ = _storage_of(identifier)
        if key not in storages:
            data = archive.record(folder + key)
            made = Storage(key, dtype, count, data)
            if data.nbytes != made.nbytes:
                raise CorruptFile(
                    f"its record {brief(folder + key)} has {data.nbytes} bytes, but claims to hold {made.nbytes}"
                )
            storages[key] = made
        return _same_dtype(storages[key], dtype)

    return Unpickler(memoryview(archive.bytes_of(pickle)), storage, limits).load()


def legacy_value(file: MappedFile, limits: Limits) -> Any:
    """What a file of the sequence of pickles holds: magic, protocol, system, the value, storage keys, then for each key
    the count of elements (int64) and the elements (torch/serialization.py, _legacy_load)."""
    refuse_tar(file)
    if file.view[:1].tobytes() != _PROTOCOL:
        raise CorruptFile(f"begins with {brief(file.view[:8].tobytes())}: it is not a file of PyTorch")
    data = memoryview(file.view)  # type: ignore[arg-type]
    storages: dict[str, Storage] = {}

    def storage(identifier: Any) -> Storage:
        key, dtype, count, view = _storage_of(identifier)
        root = storages.setdefault(key, Storage(key, dtype, count))
        if view is None:
            return _same_dtype(root, dtype)
        view_key, offset, size = view if isinstance(view, tuple) and len(view) == 3 else (None, None, None)
        if not _is_storage_key(view_key) or not _is_count(offset) or not _is_count(size):
            raise CorruptFile(f"has a view of a storage that is {described(view)}: it is damaged")
        if offset + size > root.count:
            raise CorruptFile(f"has a view of {size} elements at {offset} of a storage of {root.count}: it is damaged")
        return Storage(f"{key}:{view_key}", dtype, size, None, root, offset)

    unpickler = Unpickler(data, storage, limits)
    magic = unpickler.load()
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        if storages or unpickler.position < len(data):
            raise CorruptFile("is not a PyTorch file: it begins with a pickle of another kind")
        return magic
    protocol, system, value, keys = (unpickler.load() for _ in range(4))
    if type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
        raise Unsupported(f"is of PyTorch's protocol {described(protocol)}; {_LEGACY_PROTOCOL} is read")
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise Unsupported("was saved on a big-endian machine: only little-endian files are read")
    _place(storages, keys, file, unpickler.position)
    return value


def refuse_tar(file: MappedFile) -> None:
    """Raises Unsupported for the tar archives of PyTorch before 0.1.10."""
    at, magic = _TAR_MAGIC
    if file.view[at : at + len(magic)].tobytes() == magic:
        raise Unsupported("is a tar archive of PyTorch before 0.1.10: load it with PyTorch and save it again")


def _place(storages: dict[str, Storage], keys: Any, file: MappedFile, position: int) -> None:
    """Tells each storage where its bytes are."""
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or set(keys) != storages.keys():
        raise CorruptFile("lists other storages than its tensors need: it is damaged")
    for key in keys:
        storage = storages[key]
        count = int(file.range(position, 8).read(0, 8).view("<i8")[0])
        if count != storage.count:
            raise CorruptFile(f"its storage {brief(key)} has {count} elements, but claims to hold {storage.count}")
        storage.data = file.range(position + 8, storage.nbytes)
        position += 8 + storage.nbytes


def _storage_of(identifier: Any) -> tuple[str, TorchDtype | None, int, Any]:
    """Key, dtype, count of elements and view of a persistent id."""
    if not isinstance(identifier, tuple) or len(identifier) not in (5, 6) or not _is_text(identifier[0], "storage"):
        raise CorruptFile(f"refers to something outside its pickle that is not a storage: {described(identifier)}")
    _, kind, key, _, count, *view = identifier
    name = kind.name if isinstance(kind, Global) and kind.module.partition(".")[0] == "torch" else ""
    if name not in STORAGES:
        raise Unsupported(f"has a storage of class {described(kind)}, which is not supported")
    if not _is_storage_key(key) or not _is_count(count):
        raise CorruptFile(f"has a storage of {described(count)} elements under the key {described(key)}: it is damaged")
    return key, STORAGES[name], count, view[0] if view else None


def _is_text(value: Any, text: str) -> bool:
    return isinstance(value, str) and value == text


def _is_storage_key(value: Any) -> TypeGuard[str]:
    """Whether it can be the last part of a record's name."""
    return isinstance(value, str) and len(value) <= _LONGEST_STORAGE_KEY and "/" not in value and ".." not in value


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MOST_ELEMENTS


def _same_dtype(storage: Storage, dtype: TorchDtype | None) -> Storage:
    if storage.dtype == dtype:
        return storage
    if storage.dtype is None or dtype is None or storage.dtype.numpy.itemsize == dtype.numpy.itemsize:
        count = storage.nbytes // (1 if dtype is None else dtype.numpy.itemsize)
        return Storage(storage.key, dtype, count, None, storage)
    raise CorruptFile(f"has a storage that is both {storage.dtype.name} and {dtype.name}: it is damaged")
