"""Files of up to some megabytes that copy, hash, name or repeat what they hold again and again; made byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tests.formats.pytorch.pickle.bombs import (
    CODES,
    array,
    called,
    cell,
    doubled,
    entry,
    get,
    legacy_of,
    named,
    pushed,
    put,
    quantized,
    record,
    saved,
    storage,
    subclass,
    tensor,
)

_MANY = 50_000
_PRIME = (1 << 61) - 1  # what CPython hashes integers modulo
_TEXT = "x" * 500_000


def kept(*values: bytes) -> bytes:
    """Puts each in the memo, under its position, and leaves the stack as it was."""
    return b"".join(value + put(position) + b"0" for position, value in enumerate(values))


def repeated(opcodes: bytes, count: int = _MANY) -> bytes:
    """A list of what these opcodes push, so many times."""
    return b"](" + opcodes * count + b"e"


def long_list(count: int = _MANY, element: bytes = b"N") -> bytes:
    return repeated(element, count)


def long_tuple(count: int = _MANY, element: bytes = b"N") -> bytes:
    return b"(" + element * count + b"t"


def calls(module: str, name: str, *arguments: bytes, count: int = _MANY) -> bytes:
    """Many calls of a function with the same arguments, which are made once."""
    made = kept(named(module, name), b"(" + b"".join(arguments) + b"t")
    return made + repeated(get(0) + get(1) + b"R", count)


def integer(value: int) -> bytes:
    data = value.to_bytes(10, "little", signed=True)
    return b"\x8a\x0a" + data


def colliding(count: int = 40_000) -> Iterator[bytes]:
    """Integers whose hashes are the same."""
    return (integer(number * _PRIME) for number in range(1, count))


def unpickled() -> Iterator[tuple[str, bytes]]:
    """What the pickle machine itself would copy, hash or make."""
    text = pushed(_TEXT)
    yield "copies: encoded texts", saved(calls("_codecs", "encode", text, pushed("latin1")))
    for module, name in (("collections", "OrderedDict"), ("builtins", "set"), ("builtins", "frozenset")):
        element = b"NN\x86" if name == "OrderedDict" else b"N"
        yield f"copies: {name}", saved(calls(module, name, long_list(element=element)))
    yield "copies: Size", saved(calls("torch", "Size", long_list(element=b"K\x01")))
    yield "copies: arguments", saved(calls("copyreg", "__newobj__", named("mine", "X") + b"N" * _MANY))
    yield "copies: ignored arguments", saved(calls("torch.jit._pickle", "build_intlist", b"N" * _MANY))
    yield (
        "copies: arguments of arguments",
        saved(kept(long_tuple()) + repeated(called("torch._tensor", "_rebuild_from_type", *_newobj(get(0))), 10_000)),
    )
    name = pushed(".".join("a" * 500))
    yield "names: parts of a stack's", saved(kept(name, pushed("m")) + repeated(get(1) + get(0) + b"\x93"))
    long_name = storage(named("torch." + "a." * 480, "FloatStorage"))[:-1]
    yield "names: of storages", saved(kept(long_name) + repeated(get(0) + b"Q"))
    yield "names: keys of storages", legacy_of(kept(storage(key=text)[:-1]) + repeated(get(0) + b"Q"))
    yield "keys: colliding integers", saved(b"}(" + b"".join(key + b"N" for key in colliding()) + b"u")
    yield "keys: colliding integers of a set", saved(b"\x8f(" + b"".join(colliding()) + b"\x90")
    yield "keys: colliding tuples", saved(b"}(" + b"".join(key + b"\x85N" for key in colliding()) + b"u")
    yield (
        "keys: colliding numbers to remember by",
        saved(b"N" + b"".join(b"p" + str(number * _PRIME).encode() + b"\n" for number in range(40_000))),
    )
    yield "keys: far numbers to remember by", saved(b"N" + b"".join(put((1 << 31) + n) for n in range(_MANY)))
    yield (
        "keys: nested tuples",
        saved(
            kept(long_tuple(6000), long_tuple(6000, get(0)), long_tuple(6000, get(1)))
            + repeated(b"}" + get(2) + b"Ns", 1)
        ),
    )
    for count in (32, 64):
        wide = kept(long_tuple(count), long_tuple(count, get(0))) + b"}(" + (get(1) + b"N") * _MANY + b"u"
        yield f"keys: tuples of {count} tuples", saved(wide)
    yield "keys: equal long texts", saved(kept(text, text) + repeated(b"}" + get(0) + b"Ns", 1) + b"0" + _both(0, 1))
    yield "keys: equal texts", saved(kept(pushed("y" * 16_000), pushed("y" * 16_000)) + _both(0, 1))
    yield "tensors: of many axes", saved(_views(pushed((1,) * 32)))
    yield "tensors: of too many axes", saved(_views(long_tuple(200_000, b"K\x01")))
    huge = kept(b"\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000)
    yield "tensors: of many huge sizes", saved(huge + _views(long_tuple(200_000, get(0)), first=1))
    yield "opcodes: half a megabyte of sets", saved(b"\x8f" * (1 << 19))
    yield "opcodes: half a megabyte of dictionaries", saved(b"}" * (1 << 19))
    yield "opcodes: half a megabyte of marks", saved(b"(" * (1 << 19))
    yield "opcodes: half a megabyte of copies of the top", saved(b"N" + b"2" * (1 << 19))
    yield "opcodes: half a megabyte of objects", saved(kept(named("mine", "X")) + (get(0) + b")R") * 125_000)
    yield (
        "opcodes: half a megabyte of storages",
        saved(
            kept(storage()[:-1], storage(named("torch", "IntStorage"))[:-1]) + (get(0) + b"Q" + get(1) + b"Q") * 80_000
        ),
    )
    yield "opcodes: a decimal of a megabyte", saved(b"I" + b"9" * (1 << 20) + b"\n")
    yield "opcodes: a line without end", saved(b"I" + b"9" * (1 << 20))
    yield "opcodes: many decimals", saved(b"".join(b"I" + b"9" * 2400 + b"\n" for _ in range(400)))
    yield "opcodes: a float of a megabyte", saved(b"F" + b"9" * (1 << 20) + b"\n")
    yield "opcodes: a line of nonsense", saved(b"I" + b"x" * (1 << 20) + b"\n")


def _newobj(arguments: bytes) -> tuple[bytes, ...]:
    return named("torch.jit._pickle", "build_intlist"), named("mine", "X"), arguments


def _both(first: int, second: int) -> bytes:
    """Many dictionaries, each of two equal keys."""
    return repeated(b"}" + get(first) + b"Ns" + get(second) + b"Ns")


def _views(sizes: bytes, first: int = 0, count: int = _MANY) -> bytes:
    function = named("torch._utils", "_rebuild_tensor_v2")
    arguments = b"(" + storage() + pushed(0) + sizes + sizes + b"\x89Nt"
    kept_here = function + put(first) + b"0" + arguments + put(first + 1) + b"0"
    return kept_here + repeated(get(first) + get(first + 1) + b"R", count)


def walked() -> Iterator[tuple[str, bytes]]:
    """What going through an unpickled value would repeat."""
    pair = put(0) + b"0](" + get(0) * 2 + b"e"
    yield "shared: lists", saved(doubled(b"]", pair))
    yield "shared: tuples of many", saved(doubled(b")", put(0) + b"0(" + get(0) * 1000 + b"t", 8))
    yield (
        "shared: states",
        saved(doubled(b"}", put(0) + b"0cmine\nX\n)\x81" + get(0) + put(0) + b"0}" + _two(0) + b"b")),
    )
    yield "shared: modules", saved(doubled(_module(b"}"), put(0) + b"0" + _module(b"}" + _two(0))))
    yield "shared: a list in a list", saved(kept(long_list()) + repeated(get(0)))
    numbers = b"}(" + b"".join(pushed(f"{n}") + b"K\x01" for n in range(15_000)) + b"u"
    yield "shared: a dictionary in objects", saved(kept(numbers) + repeated(record(get(0))))
    yield "shared: two dictionaries in objects", saved(kept(numbers + numbers + b"\x86") + repeated(record(get(0))))
    yield "shared: a dictionary of numbers", saved(kept(numbers) + repeated(get(0)))
    long_name = entry(numbers, pushed("n" * 16_000))
    yield "shared: a long name", saved(doubled(long_name, put(0) + b"0}" + pushed("n" * 16_000) + get(0) + b"s", 10))
    beside = b"}(" + pushed("state_dict") + entry(tensor())
    beside += b"".join(pushed(f"{n}") + get(0) for n in range(25_000)) + b"u"
    yield "shared: a list beside the model", saved(kept(long_list()) + beside)
    yield (
        "shared: models in models",
        saved(doubled(beside, put(1) + b"0}" + pushed("state_dict") + get(1) + b"s", 200).replace(get(0), b"N")),
    )
    packed = doubled(b")", put(0) + b"0(" + get(0) * 1000 + b"t", 8)
    yield "shared: packed parameters", saved(entry(record(packed, "ScriptObject", "torch"), pushed("a._packed_params")))
    yield "shared: parts of cells", saved(cell(kept(packed) + long_tuple(5, get(0))))
    yield (
        "shared: states of cells",
        saved(
            kept(record(b")" + b"\x85" * 100_000, "ScriptObject", "torch"))
            + b"}("
            + b"".join(pushed(f"{n}_all_weight_values.0.param") + get(0) for n in range(20_000))
            + b"u"
        ),
    )
    yield "shared: numbers of cells", saved(cell(b")", "1" * 5000))
    inner = subclass(b"}" + b"".join(pushed(f"{n}") + get(0) + b"s" for n in range(1000)))
    yield "shared: tensors in tensors", saved(entry(doubled(subclass(b"}"), put(0) + b"0" + inner, 8)))
    sizes = kept(long_tuple(element=b"K\x01"))
    many = b"}(" + b"".join(pushed(f"{n}") + get(0) for n in range(25_000)) + b"u"
    yield "shared: attributes of a tensor", saved(sizes + entry(subclass(many)))
    yield "shared: a tensor under many names", saved(kept(tensor()) + repeated(get(0), 500_000))
    yield "shared: frozen constants", saved(kept(tensor()) + repeated(get(0), 500_000))


def _two(index: int) -> bytes:
    return b"(" + pushed("a") + get(index) + pushed("b") + get(index) + b"u"


def _module(children: bytes) -> bytes:
    return record(entry(children, pushed("_modules")))


def repeating() -> Iterator[tuple[str, bytes]]:
    """What would be written many times over, or is larger than any memory."""
    yield (
        "repeats: many views without strides",
        saved(
            b"}("
            + b"".join(pushed(f"{n}") + tensor(size=pushed((1 << 20,)), stride=pushed((0,))) for n in range(2000))
            + b"u"
        ),
    )
    yield "repeats: one view without strides", saved(entry(tensor(size=pushed((1 << 40,)), stride=pushed((0,)))))
    yield (
        "repeats: a view of the largest sizes",
        saved(entry(tensor(size=pushed(((1 << 63) - 1,) * 32), stride=pushed((0,) * 32)))),
    )
    large = {"1": b"\0" * (4 << 20)}
    whole = tensor(storage(key=pushed("1"), count=pushed(1 << 20)), size=pushed((1 << 20,)), stride=pushed((1,)))
    for count in (500, 10_000):
        yield f"repeats: a large tensor under {count} names", saved(kept(whole) + repeated(get(0), count), **large)
    shifted = (
        tensor(storage(key=pushed("1"), count=pushed(1 << 20)), pushed(n), pushed((1 << 19,)), pushed((1,)))
        for n in range(3000)
    )
    yield "repeats: overlapping views", saved(b"](" + b"".join(shifted) + b"e", **large)
    numbers = called("_codecs", "encode", pushed("\0" * 400_000), pushed("latin1"))
    data = array(pushed((100_000,))).replace(called("_codecs", "encode", pushed("\0" * 12), pushed("latin1")), numbers)
    yield "repeats: an array under many names", saved(kept(data) + repeated(get(0), 10_000))
    scales = kept(repeated(b"G" + struct.pack(">d", 1.0)), repeated(b"K\x00"))
    channels = quantized(named("torch", "per_channel_affine"), get(0), get(1), pushed(0))
    channels = channels.replace(pushed((2, 3)), pushed((_MANY, 1))).replace(pushed((3, 1)), pushed((0, 0)))
    yield "repeats: a list of scales", saved(scales + channels + put(2) + b"0" + repeated(get(2), 20_000))
    empty = tensor(
        CODES,
        pushed(0),
        pushed((1 << 40, 0)),
        pushed((0, 0)),
        b"(" + _channel_scales() + b"t",
        function="_rebuild_qtensor",
    )
    yield "repeats: scales of nothing", saved(entry(empty), **{"1": b"\0" * 4096})
    half = pushed((1 << 24,)), pushed((0,))
    names = ("fc.weight", "fc.weight_fake_quant.scale", "fc.weight_fake_quant.zero_point")
    observed = (f"fc.weight_fake_quant.activation_post_process.{role}_val" for role in ("min", "max"))
    yield (
        "repeats: scales of a fake quantizer",
        saved(
            b"}(" + b"".join(pushed(name) + tensor(storage(), pushed(0), *half) for name in (*names, *observed)) + b"u"
        ),
    )
    quantizers = (pushed(f"{n}.weight{part}") + get(0) for n in range(15_000) for part in ("", "_fake_quant.scale"))
    yield (
        "repeats: many fake quantizers",
        saved(kept(tensor(size=b")", stride=b")")) + b"}(" + b"".join(quantizers) + b"u"),
    )


def _channel_scales() -> bytes:
    scale = tensor(storage(key=pushed("1")), size=pushed((1 << 40,)), stride=pushed((0,)))
    return named("torch", "per_channel_affine") + scale + scale + pushed(0)


def copying() -> Iterator[tuple[str, bytes]]:
    """All of them."""
    yield from unpickled()
    yield from walked()
    yield from repeating()
