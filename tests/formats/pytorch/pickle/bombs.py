"""Files of up to a megabyte that ask for time or memory without end, each by another way; made byte by byte."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping

from tests.formats.pytorch.pickle.hostile_pickles import legacy

FLOATS = b"\0" * 4096


def zipped(records: Mapping[str, bytes]) -> bytes:
    """An archive of these records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def saved(opcodes: bytes, **records: bytes) -> bytes:
    """An archive whose pickle is these opcodes; records are storages."""
    storages = {"0": FLOATS, **records}
    return zipped({"data.pkl": b"\x80\x02" + opcodes + b"."} | {f"data/{key}": b for key, b in storages.items()})


def pushed(value: object) -> bytes:
    """The opcodes that push plain data, without a memo."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, 2)
    pickler.fast = True
    pickler.dump(value)
    return out.getvalue()[2:-1]


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def called(module: str, name: str, *arguments: bytes) -> bytes:
    """A call with these opcodes for its arguments."""
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)


def storage(
    kind: bytes = named("torch", "FloatStorage"), key: bytes = pushed("0"), count: bytes = pushed(1024), *view: bytes
) -> bytes:
    return b"(" + pushed("storage") + kind + key + pushed("cpu") + count + b"".join(view) + b"tQ"


def tensor(
    held: bytes = b"",
    offset: bytes = pushed(0),
    size: bytes = pushed((2, 3)),
    stride: bytes = pushed((3, 1)),
    *more: bytes,
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    arguments = more or (b"\x89", b"N")
    return called("torch._utils", function, held or storage(), offset, size, stride, *arguments)


def entry(value: bytes, key: bytes = pushed("x")) -> bytes:
    """A dictionary of one entry."""
    return b"}" + key + value + b"s"


def record(state: bytes, name: str = "Net", module: str = "mine") -> bytes:
    """An object with that state."""
    return named(module, name) + b")\x81" + state + b"b"


def doubled(first: bytes, twice: bytes, levels: int = 60) -> bytes:
    return first + twice * levels


#: Values that take for ever, all memory or the stack of whoever goes through all of them. `measured` leaves a stack of
#: a megabyte, so that the deep ones need not be large.
VALUES: Mapping[str, bytes] = {
    "a tuple that holds itself twice": doubled(b")", b"2\x86"),
    "a list that holds itself twice": doubled(b"]", put(0) + b"0](" + get(0) * 2 + b"e"),
    "a dictionary that holds itself twice": doubled(
        b"}", put(0) + b"0}(" + pushed("a") + get(0) + pushed("b") + get(0) + b"u"
    ),
    "an object that holds itself twice": doubled(b")", put(0) + b"0cmine\nX\n(" + get(0) * 2 + b"tR"),
    "a deep tuple": b")" + b"\x85" * 30_000,
    "a deep list": b"]" + b"".join((put(0), b"0]", get(0), b"a")) * 3_000,
    "a deep object": b")" + b"".join((b"\x85", put(0), b"0cmine\nX\n", get(0), b"R")) * 3_000,
    "a list in itself": b"]" + put(0) + get(0) + b"a",
    "an integer of 8000 bits": b"\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000,
    "an integer of 4000 digits": b"L" + b"9" * 4000 + b"L\n",
    "a text of 100 000 characters": b"X" + struct.pack("<I", 100_000) + b"\x01" * 100_000,
    "a lone surrogate": b"V\\ud800\n",
    "not a number": b"G" + struct.pack(">d", float("nan")),
}

QUANTIZED = named("torch", "per_tensor_affine")
CODES = storage(named("torch", "QInt8Storage"), count=pushed(4096))


def quantized(*quantizer: bytes) -> bytes:
    parameters = b"(" + b"".join(quantizer) + b"t"
    return tensor(CODES, pushed(0), pushed((2, 3)), pushed((3, 1)), parameters, function="_rebuild_qtensor")


def fake_quantized(**settings: bytes) -> bytes:
    """A module in training, whose fake quantizer has these settings."""

    def module(name: str, **groups: bytes) -> bytes:
        state = b"".join(pushed(group) + content for group, content in groups.items())
        return record(b"}(" + state + b"u", name, "torch.nn.modules.linear")

    scale = tensor(size=pushed((1,)), stride=pushed((1,)))
    quantizer = module("FakeQuantize", _buffers=entry(scale, pushed("scale")), _modules=b"}", **settings)
    children = entry(quantizer, pushed("weight_fake_quant"))
    return module("Linear", _parameters=entry(tensor(), pushed("weight")), _modules=children)


def array(shape: bytes = pushed((3,)), kind: bytes = pushed("f4"), order: bytes = pushed("<")) -> bytes:
    made = called("numpy.core.multiarray", "_reconstruct", named("numpy", "ndarray"), pushed((0,)), pushed("b"))
    dtype = called("numpy", "dtype", kind, b"\x89", b"\x88") + b"(" + pushed(3) + order + b"NNNtb"
    data = called("_codecs", "encode", pushed("\0" * 12), pushed("latin1"))
    return made + b"(" + pushed(1) + shape + dtype + b"\x89" + data + b"tb"


def subclass(attributes: bytes, cls: bytes = named("torchao", "Int8Tensor"), size: bytes = pushed((2, 3))) -> bytes:
    function = named("torch._utils", "_rebuild_wrapper_subclass")
    arguments = b"(" + cls + named("torch", "float32") + size + b"t"
    return called("torch._tensor", "_rebuild_from_type_v2", function, cls, arguments, attributes)


def cell(state: bytes, number: str = "0") -> bytes:
    return entry(record(state, "ScriptObject", "torch"), pushed(f"lstm._all_weight_values.{number}.param"))


def legacy_of(opcodes: bytes) -> bytes:
    return legacy(b"\x80\x02" + opcodes + b".")


def legacy_parts(*opcodes: bytes) -> bytes:
    """Pickles one after the other, the first of them the magic number."""
    return b"".join(b"\x80\x02" + part + b"." for part in opcodes)


MAGIC = pushed(0x1950A86A20F9469CFC6C)
SYSTEM = pushed({"little_endian": True})

#: Where a file may have any of these values, as the file with it.
PLACES: Mapping[str, Callable[[bytes], bytes]] = {
    "the whole file": lambda v: saved(v),
    "a persistent id": lambda v: saved(v + b"Q"),
    "an object as a persistent id": lambda v: saved(b"cmine\nX\n" + v + b"\x85RQ"),
    "a storage's word": lambda v: saved(entry(tensor(b"(" + v + pushed((1, 2, 3, 4))[1:-1] + b"tQ"))),
    "a storage's class": lambda v: saved(entry(tensor(storage(v)))),
    "a storage's key": lambda v: saved(entry(tensor(storage(key=v)))),
    "a storage's count": lambda v: saved(entry(tensor(storage(count=v)))),
    "a tensor's storage": lambda v: saved(entry(tensor(v))),
    "a tensor's offset": lambda v: saved(entry(tensor(offset=v))),
    "a tensor's size": lambda v: saved(entry(tensor(size=v))),
    "a tensor's strides": lambda v: saved(entry(tensor(stride=v))),
    "one size": lambda v: saved(entry(tensor(size=v + b"\x85", stride=pushed((0,))))),
    "one stride": lambda v: saved(entry(tensor(size=pushed((2,)), stride=v + b"\x85"))),
    "a tensor's metadata": lambda v: saved(entry(tensor(storage(), pushed(0), b")", b")", b"\x89", b"N", v))),
    "a tensor's dtype": lambda v: saved(
        entry(tensor(storage(), pushed(0), b")", b")", b"\x89", b"N", v, function="_rebuild_tensor_v3"))
    ),
    "a quantizer": lambda v: saved(entry(tensor(CODES, pushed(0), b")", b")", v, function="_rebuild_qtensor"))),
    "a quantizer's scheme": lambda v: saved(entry(quantized(v, pushed(0.5), pushed(0)))),
    "a scale": lambda v: saved(entry(quantized(QUANTIZED, v, pushed(0)))),
    "a zero point": lambda v: saved(entry(quantized(QUANTIZED, pushed(0.5), v))),
    "a list of scales": lambda v: saved(
        entry(quantized(named("torch", "per_channel_affine"), b"]" + v + b"a" + v + b"a", pushed([0, 0]), pushed(0)))
    ),
    "a list of zero points": lambda v: saved(
        entry(quantized(named("torch", "per_channel_affine"), pushed([1.0, 1.0]), b"]" + (v + b"a") * 2, pushed(0)))
    ),
    "an axis": lambda v: saved(
        entry(quantized(named("torch", "per_channel_affine"), pushed([1.0, 1.0]), pushed([0, 0]), v))
    ),
    "a parameter": lambda v: saved(entry(called("torch._utils", "_rebuild_parameter", v, b"\x89", b"N"))),
    "a subclass": lambda v: saved(entry(subclass(b"}", cls=v))),
    "a subclass's size": lambda v: saved(entry(subclass(b"}", size=v))),
    "a subclass's function": lambda v: saved(
        entry(called("torch._tensor", "_rebuild_from_type_v2", v, named("a", "B"), b")", b"}"))
    ),
    "a subclass's arguments": lambda v: saved(
        entry(called("torch._tensor", "_rebuild_from_type_v2", named("torch", "Size"), named("a", "B"), v, b"}"))
    ),
    "an attribute of a subclass": lambda v: saved(entry(subclass(entry(v, pushed("block_size"))))),
    "an encoding": lambda v: saved(called("_codecs", "encode", pushed("x"), v)),
    "an encoded text": lambda v: saved(called("_codecs", "encode", v, pushed("latin1"))),
    "a key": lambda v: saved(entry(b"N", v)),
    "a key in a tuple": lambda v: saved(entry(b"N", v + b"\x85")),
    "an element of a set": lambda v: saved(b"\x8f(" + v + b"\x90"),
    "an element of a frozenset": lambda v: saved(b"(" + v + b"\x91"),
    "what a set is made of": lambda v: saved(called("builtins", "set", v)),
    "what an OrderedDict is made of": lambda v: saved(called("collections", "OrderedDict", v)),
    "a pair of an OrderedDict": lambda v: saved(called("collections", "OrderedDict", b"]" + v + b"a")),
    "a key of an OrderedDict": lambda v: saved(called("collections", "OrderedDict", b"]" + v + b"N\x86a")),
    "what a Size is made of": lambda v: saved(called("torch", "Size", v)),
    "what is called": lambda v: saved(v + b")R"),
    "arguments": lambda v: saved(named("mine", "X") + v + b"R"),
    "a class of a new object": lambda v: saved(called("copyreg", "__newobj__", v)),
    "a module's name": lambda v: saved(v + pushed("X") + b"\x93"),
    "what a state is set on": lambda v: saved(v + b"}b"),
    "what items are appended to": lambda v: saved(v + b"Na"),
    "what entries are set in": lambda v: saved(v + b"NNs"),
    "a state": lambda v: saved(record(v)),
    "a state of slots": lambda v: saved(record(v + b"2\x86")),
    "a state dict's entry": lambda v: saved(entry(v, pushed("state_dict"))),
    "another entry of a checkpoint": lambda v: saved(
        b"}(" + pushed("state_dict") + entry(tensor()) + pushed("more") + v + b"u"
    ),
    "an array's shape": lambda v: saved(entry(array(v))),
    "an array's size": lambda v: saved(entry(array(v + b"\x85"))),
    "an array's dtype": lambda v: saved(entry(array(kind=v))),
    "an array's byte order": lambda v: saved(entry(array(order=v))),
    "packed parameters": lambda v: saved(entry(record(v, "ScriptObject", "torch"), pushed("fc._packed_params"))),
    "the name of packed parameters": lambda v: saved(entry(record(v + b"\x85", "ScriptObject", "torch"))),
    "a cell's state": lambda v: saved(cell(v)),
    "a part of a cell's state": lambda v: saved(cell(b"(" + v + v + v + v + v + b"t")),
    "the state of a convolution": lambda v: saved(
        record(b"(" + v * 15 + b"t", "Conv2d", "torch.ao.nn.quantized.modules.conv")
    ),
    "quant_min": lambda v: saved(fake_quantized(quant_min=v, quant_max=pushed(7))),
    "quant_max": lambda v: saved(fake_quantized(quant_min=pushed(-8), quant_max=v)),
    "ch_axis": lambda v: saved(fake_quantized(ch_axis=v)),
    "buffers that are not saved": lambda v: saved(fake_quantized(_non_persistent_buffers_set=v)),
    "the byte order": lambda v: zipped({"data.pkl": b"N.", "byteorder": v}),
    "a legacy file's magic number": lambda v: legacy_parts(v, pushed(1001), SYSTEM, b"}", b"]"),
    "a legacy file's protocol": lambda v: legacy_parts(MAGIC, v, SYSTEM, b"}", b"]"),
    "a legacy file's system": lambda v: legacy_parts(MAGIC, pushed(1001), v, b"}", b"]"),
    "a legacy file's byte order": lambda v: legacy_parts(
        MAGIC, pushed(1001), entry(v, pushed("little_endian")), b"}", b"]"
    ),
    "a legacy file's storages": lambda v: legacy_parts(MAGIC, pushed(1001), SYSTEM, b"}", v),
    "a legacy file's storage": lambda v: legacy_parts(MAGIC, pushed(1001), SYSTEM, b"}", b"]" + v + b"a"),
    "a view of a legacy storage": lambda v: legacy_of(
        entry(tensor(storage(named("torch", "FloatStorage"), pushed("0"), pushed(4), v)))
    ),
    "a key of a legacy view": lambda v: legacy_of(
        entry(
            tensor(storage(named("torch", "FloatStorage"), pushed("0"), pushed(4), v + pushed(0) + pushed(1) + b"\x87"))
        )
    ),
    "an offset of a legacy view": lambda v: legacy_of(
        entry(
            tensor(
                storage(named("torch", "FloatStorage"), pushed("0"), pushed(4), pushed("v") + v + pushed(1) + b"\x87")
            )
        )
    ),
}


def everywhere() -> Iterator[tuple[str, bytes]]:
    """Every value in every place, by name."""
    for place, made in PLACES.items():
        for value, opcodes in VALUES.items():
            yield f"{place}: {value}", made(opcodes)


def honest() -> bytes:
    """A state dict of a megabyte of pickle, as torch.save writes it."""
    tensors = b"".join(pushed(f"layers.{number}.weight") + tensor() for number in range(6000))
    return saved(b"}(" + tensors + b"u")
