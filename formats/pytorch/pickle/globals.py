"""What a pickle may name, by whole (module, name), and the few constructors that run.

Names of PyTorch, of third parties and of users stay names: nothing of them is imported. Of Python's own library, and of
what hides behind a dotted name, only data types are let through; anything else refuses the file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Any

from nibblecast.converters.errors import CorruptFile, Unsupported, brief
from nibblecast.converters.ir import MOST_DIMENSIONS
from nibblecast.formats.pytorch.pickle.dtypes import ALIASES, DTYPES
from nibblecast.formats.pytorch.pickle.limits import ENTRY, REFERENCE, STEP
from nibblecast.formats.pytorch.pickle.records import (
    AttributedDict,
    Global,
    Quantizer,
    Storage,
    StridedTensor,
    SubclassTensor,
    TorchDtype,
    UnknownObject,
    described,
    is_tensor,
    key_of,
)

#: Counts what is about to be done with values; raises CorruptFile where it is too much.
Spend = Callable[[int], None]

_PYTHON_2_MODULES = frozenset(
    ("__builtin__", "copy_reg", "cPickle", "commands", "exceptions", "os2", "popen2", "urllib2", "new", "nt", "posix2")
)
_STANDARD_LIBRARY = frozenset(sys.stdlib_module_names) | _PYTHON_2_MODULES
_MOST_NAME = 1 << 10
_LARGEST_SIZE = 1 << 63
_MOST_PARAMETERS = 4  # of a quantizer, its scheme included: one more than any has

#: Names of Python's own library that are only data: none of them runs, whatever it is called with.
_DATA = frozenset(
    {
        *(("collections", name) for name in ("OrderedDict", "defaultdict", "Counter", "deque", "ChainMap")),
        *(
            (module, name)
            for module in ("builtins", "__builtin__")
            for name in (
                *("set", "frozenset", "list", "dict", "tuple", "int", "long", "float", "complex", "bool", "str"),
                *("unicode", "bytes", "bytearray", "slice", "range", "xrange", "object", "Ellipsis", "NotImplemented"),
                "NoneType",
            )
        ),
        *(
            (module, name)
            for module in ("copyreg", "copy_reg")
            for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
        ),
        ("_codecs", "encode"),
        *(("datetime", name) for name in ("datetime", "date", "time", "timedelta", "timezone")),
        *(
            (module, name)
            for module in ("pathlib", "pathlib._local")
            for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
        ),
        ("argparse", "Namespace"),
        ("types", "SimpleNamespace"),
        ("functools", "partial"),
        ("decimal", "Decimal"),
        ("fractions", "Fraction"),
        ("uuid", "UUID"),
        ("logging", "getLogger"),
        ("typing", "Any"),
        ("typing", "Union"),
        ("typing", "Optional"),
        ("random", "Random"),
    }
)


def checked_global(module: Any, name: Any, spend: Spend) -> Global:
    """The name of a class or function. Raises CorruptFile where it is one of Python's own library that is no data, or
    one that reaches into another module (`torch.serialization os.system`)."""
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _MOST_NAME:
        raise CorruptFile("its pickle names a class by something that is not text")
    spend(len(module) + len(name))
    inner = name.split(".")
    standard = module.split(".")[0] in _STANDARD_LIBRARY and (module, name) not in _DATA
    if standard or not _STANDARD_LIBRARY.isdisjoint(inner[:-1]) or any(part.startswith("__") for part in inner[1:]):
        raise CorruptFile(
            f"its pickle would call {module}.{name}, which no model needs: it may be an attack, "
            "and nothing of it was executed; save the weights alone (torch.save(model.state_dict(), ...))"
        )
    return Global(module, name)


def made(maker: Global, arguments: tuple[Any, ...], keywords: dict[Any, Any], spend: Spend) -> Any:
    """What a call of `maker` gives: what its constructor here makes of the arguments, or else a record of them."""
    constructor = CONSTRUCTORS.get((maker.module, maker.name))
    if constructor is None or keywords:
        return UnknownObject(maker, arguments, keywords)
    spend(REFERENCE * len(arguments))
    return constructor(spend, *arguments)


def _ordered_dict(spend: Spend, pairs: Any = ()) -> AttributedDict:
    spend(ENTRY * _length(pairs))
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise TypeError("a dictionary of what are no pairs")
    return AttributedDict((key_of(key, spend), value) for key, value in pairs)


def _set(spend: Spend, values: Any = ()) -> set[Any]:
    spend(ENTRY * _length(values))
    return {key_of(value, spend) for value in values}


def _frozenset(spend: Spend, values: Any = ()) -> frozenset[Any]:
    spend(ENTRY * _length(values))
    return frozenset(key_of(value, spend) for value in values)


def _length(values: Any) -> int:
    if not isinstance(values, tuple | list):
        raise TypeError(f"a collection needs a list, not {type(values).__name__}")
    return len(values)


def _encoded(spend: Spend, text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    # how protocol 2 writes bytes
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding not in ("latin1", "latin-1", "ascii"):
        raise ValueError(f"bytes in the encoding {described(encoding)}")
    spend(len(text))
    return text.encode("latin1")


def _reconstructed(_spend: Spend, cls: Any, base: Any = None, state: Any = None) -> UnknownObject:
    return UnknownObject(_checked_class(cls), (base, state))


def _new_object(_spend: Spend, cls: Any, *arguments: Any) -> UnknownObject:
    return UnknownObject(_checked_class(cls), arguments)


def _checked_class(cls: Any) -> Global:
    if not isinstance(cls, Global):
        raise TypeError(f"an object needs a class, not {type(cls).__name__}")
    return cls


def _size(spend: Spend, sizes: Any = ()) -> tuple[int, ...]:
    spend(STEP * _length(sizes))
    return _integers(sizes, "size")


def _integers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > MOST_DIMENSIONS:
        raise CorruptFile(f"has a tensor of {what} {described(values)}: up to {MOST_DIMENSIONS} counts are needed")
    if not all(type(value) is int and 0 <= value < _LARGEST_SIZE for value in values):
        raise CorruptFile(f"has a tensor of {what} {described(values)}: counts are needed")
    return tuple(values)


def named_dtype(value: Any) -> TorchDtype:
    """What `torch.NAME` stands for. Raises Unsupported where that is no dtype known here."""
    name = value.name if isinstance(value, Global) and value.module == "torch" else ""
    dtype = DTYPES.get(ALIASES.get(name, name))
    if dtype is None:
        raise Unsupported(f"has a tensor of dtype {described(value)}, which is not supported")
    return dtype


def view_of(storage: Any, offset: Any, size: Any, stride: Any, dtype: TorchDtype | None = None) -> StridedTensor:
    """A view of a storage, checked against it: sizes, strides and the last element. Raises CorruptFile where they do
    not fit."""
    if not isinstance(storage, Storage):
        raise CorruptFile(f"has a tensor whose storage is {type(storage).__name__}")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise CorruptFile("has a tensor without a dtype over an untyped storage")
    shape, strides = _integers(size, "size"), _integers(stride, "stride")
    if type(offset) is not int or not 0 <= offset < _LARGEST_SIZE or len(shape) != len(strides):
        raise CorruptFile(
            f"has a tensor of size {brief(shape)}, strides {brief(strides)} at offset {described(offset)}: "
            "they do not fit"
        )
    last = offset + sum((count - 1) * step for count, step in zip(shape, strides, strict=True))
    held = storage.nbytes // dtype.numpy.itemsize
    if dtype.name == "quint4x2":  # whose views count elements: a byte is two
        held *= dtype.elements
    if prod(shape) and last >= held:
        raise CorruptFile(
            f"has a tensor of size {brief(shape)} and strides {brief(strides)} at offset {offset}, "
            f"which reaches element {brief(last)} of a storage of {held}: it is damaged"
        )
    return StridedTensor(storage, dtype, offset, shape, strides)


def _rebuild_tensor(
    spend: Spend, storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: TorchDtype | None = None
) -> StridedTensor:
    if isinstance(size, tuple | list):
        spend(2 * STEP * len(size))
    return view_of(storage, offset, size, stride, dtype)


def _rebuild_tensor_v2(
    spend: Spend,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _grad: Any = None,
    _hooks: Any = None,
    metadata: Any = None,
) -> StridedTensor:
    _refuse_lazy_bits(metadata)
    return _rebuild_tensor(spend, storage, offset, size, stride)


def _rebuild_tensor_v3(
    spend: Spend,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> StridedTensor:
    _refuse_lazy_bits(metadata)
    return _rebuild_tensor(spend, storage, offset, size, stride, dtype=named_dtype(dtype))


def _refuse_lazy_bits(metadata: Any) -> None:
    # lazily conjugated or negated views, whose storage holds other values
    if isinstance(metadata, dict) and any(metadata.get(bit) for bit in ("conj", "neg")):
        raise Unsupported("has a lazily conjugated or negated tensor: save it after resolve_conj() or resolve_neg()")


def _rebuild_qtensor(
    spend: Spend, storage: Any, offset: Any, size: Any, stride: Any, quantizer: Any, *_: Any
) -> StridedTensor:
    plain = _rebuild_tensor(spend, storage, offset, size, stride)
    scheme, *parameters = quantizer[:_MOST_PARAMETERS] if isinstance(quantizer, tuple) and quantizer else (None,)
    name = scheme.name if isinstance(scheme, Global) else ""
    # float qparams are written under the name of the integer ones; their storages tell them apart
    wanted = {"per_tensor_affine": 2, "per_channel_affine": 3, "per_channel_affine_float_qparams": 3}.get(name)
    if not plain.dtype.quantized or wanted is None or len(parameters) != wanted:
        raise CorruptFile(f"has a quantized tensor of {plain.dtype.name} with the parameters {described(quantizer)}")
    return StridedTensor(plain.storage, plain.dtype, plain.offset, plain.shape, plain.strides, Quantizer(*parameters))


def _rebuild_parameter(_spend: Spend, data: Any, *_: Any) -> Any:
    if not is_tensor(data):
        raise CorruptFile(f"has a parameter that is not a tensor but {type(data).__name__}")
    return data


def _rebuild_from_type(spend: Spend, function: Any, cls: Any, arguments: Any, state: Any = None) -> Any:
    """A tensor of a subclass: where it wraps others, with these; else the tensor that it is itself."""
    known = isinstance(function, Global) and (function.module, function.name) in CONSTRUCTORS
    if not known or not isinstance(cls, Global) or not isinstance(arguments, tuple):
        raise Unsupported(
            f"has a tensor of class {described(cls)}, made by {described(function)}, which is not supported"
        )
    tensor = made(function, arguments, {}, spend)
    if isinstance(tensor, SubclassTensor) and isinstance(state, dict):
        return SubclassTensor(tensor.class_name, tensor.shape, tensor.dtype, state)
    return tensor


def _rebuild_wrapper_subclass(_spend: Spend, cls: Any, dtype: Any, size: Any, *_: Any) -> SubclassTensor:
    if not isinstance(cls, Global) or not isinstance(dtype, Global):
        raise CorruptFile("has a wrapping tensor without a class or a dtype")
    return SubclassTensor(cls.name.rpartition(".")[2], _integers(size, "size"), dtype.name, {})


def _itself(_spend: Spend, value: Any, *_: Any) -> Any:
    return value


#: What runs when a pickle calls it; anything else becomes a record.
CONSTRUCTORS: Mapping[tuple[str, str], Callable[..., Any]] = MappingProxyType(
    {
        ("collections", "OrderedDict"): _ordered_dict,
        ("builtins", "set"): _set,
        ("__builtin__", "set"): _set,
        ("builtins", "frozenset"): _frozenset,
        ("__builtin__", "frozenset"): _frozenset,
        ("_codecs", "encode"): _encoded,
        ("copyreg", "_reconstructor"): _reconstructed,
        ("copy_reg", "_reconstructor"): _reconstructed,
        ("copyreg", "__newobj__"): _new_object,
        ("copy_reg", "__newobj__"): _new_object,
        ("torch", "Size"): _size,
        ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
        ("torch._utils", "_rebuild_qtensor"): _rebuild_qtensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
        ("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper_subclass,
        ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
        ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
        ("torch.nn.parameter", "Parameter"): _rebuild_parameter,
        ("torch.nn.parameter", "Buffer"): _rebuild_parameter,
        # what TorchScript wraps its typed containers in
        ("torch.jit._pickle", "build_intlist"): _itself,
        ("torch.jit._pickle", "build_doublelist"): _itself,
        ("torch.jit._pickle", "build_boollist"): _itself,
        ("torch.jit._pickle", "build_tensorlist"): _itself,
        ("torch.jit._pickle", "restore_type_tag"): _itself,
    }
)
