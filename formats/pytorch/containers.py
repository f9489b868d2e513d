"""From a file to the Python value that was saved in it, its tensors as views of the file.

Three containers hold pickles: ZIP archives (torch >= 1.6, TorchScript included), the sequence of pickles before that,
and none: a bare pickle. .pt2 archives (torch.export) hold none; `formats.pytorch.exported` reads them.
"""

from __future__ import annotations

from typing import Any

from converters.errors import CorruptFile, Unsupported
from converters.storage import MappedFile
from formats.pytorch.archive import Archive
from formats.pytorch.dtypes import STORAGES
from formats.pytorch.unpickler import Unpickler
from formats.pytorch.values import Global, Storage, TorchDtype

ZIP_MAGIC = b"PK\x03\x04"

_PROTOCOL = b"\x80"  # the opcode with which all pickles of PyTorch begin
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_TAR_MAGIC = (257, b"ustar")


def saved_value(archive: Archive, pickle: str = "data.pkl", folder: str = "data/") -> Any:
    """What the record `pickle` of an archive holds; the storages are records in `folder`."""
    if "byteorder" in archive and archive.bytes_of("byteorder") != b"little":
        raise Unsupported(f"was saved with the byte order {archive.bytes_of('byteorder')!r}: only little is read")
    storages: dict[str, Storage] = {}

    def storage(identifier: Any) -> Storage:
        key, dtype, count, _ = _storage_of(identifier)
        if key not in storages:
            data = archive.record(folder + key)
            made = Storage(key, dtype, count, data)
            if data.nbytes != made.nbytes:
                raise CorruptFile(
                    f"its record '{folder + key}' has {data.nbytes} bytes, but claims to hold {made.nbytes}"
                )
            storages[key] = made
        return _same_dtype(storages[key], dtype)

    return Unpickler(memoryview(archive.bytes_of(pickle)), storage).load()


def legacy_value(file: MappedFile) -> Any:
    """What a file of the sequence of pickles holds: magic, protocol, system, the value, storage keys, then for each key
    the count of elements (int64) and the elements (torch/serialization.py, _legacy_load)."""
    refuse_tar(file)
    if file.view[:1].tobytes() != _PROTOCOL:
        raise CorruptFile(f"begins with {file.view[:8].tobytes()!r}: it is no file of PyTorch")
    data = memoryview(file.view)  # type: ignore[arg-type]
    storages: dict[str, Storage] = {}

    def storage(identifier: Any) -> Storage:
        key, dtype, count, view = _storage_of(identifier)
        root = storages.setdefault(key, Storage(key, dtype, count))
        if view is None:
            return _same_dtype(root, dtype)
        view_key, offset, size = view
        if offset < 0 or size < 0 or offset + size > root.count:
            raise CorruptFile(f"has a view of {size} elements at {offset} of a storage of {root.count}: it is damaged")
        return Storage(f"{key}:{view_key}", dtype, size, None, root, offset)

    unpickler = Unpickler(data, storage)
    magic = unpickler.load()
    if magic != _LEGACY_MAGIC:
        if storages or unpickler.position < len(data):
            raise CorruptFile("is no PyTorch file: it begins with a pickle of another kind")
        return magic
    protocol, system, value, keys = (unpickler.load() for _ in range(4))
    if protocol != _LEGACY_PROTOCOL:
        raise Unsupported(f"is of PyTorch's protocol {protocol!r}; {_LEGACY_PROTOCOL} is read")
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
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise CorruptFile("lists other storages than its tensors need: it is damaged")
    for key in keys:
        storage = storages[key]
        count = int(file.range(position, 8).read(0, 8).view("<i8")[0])
        if count != storage.count:
            raise CorruptFile(f"its storage '{key}' has {count} elements, but claims to hold {storage.count}")
        storage.data = file.range(position + 8, storage.nbytes)
        position += 8 + storage.nbytes


def _storage_of(identifier: Any) -> tuple[str, TorchDtype | None, int, Any]:
    """Key, dtype, count of elements and view of a persistent id."""
    if not isinstance(identifier, tuple) or len(identifier) not in (5, 6) or identifier[0] != "storage":
        raise CorruptFile(f"refers to something outside its pickle that is no storage: {identifier!r:.80}")
    _, kind, key, _, count, *view = identifier
    name = kind.name if isinstance(kind, Global) and kind.module.split(".")[0] == "torch" else ""
    if name not in STORAGES:
        raise Unsupported(f"has a storage of class {kind}, which is not known here")
    if not isinstance(key, str) or "/" in key or ".." in key or type(count) is not int or count < 0:
        raise CorruptFile(f"has a storage of {count!r} elements under the key {key!r:.80}: it is damaged")
    return key, STORAGES[name], count, view[0] if view else None


def _same_dtype(storage: Storage, dtype: TorchDtype | None) -> Storage:
    if storage.dtype == dtype:
        return storage
    if storage.dtype is None or dtype is None or storage.dtype.numpy.itemsize == dtype.numpy.itemsize:
        count = storage.nbytes // (1 if dtype is None else dtype.numpy.itemsize)
        return Storage(storage.key, dtype, count, None, storage)
    raise CorruptFile(f"has a storage that is both {storage.dtype.name} and {dtype.name}: it is damaged")
