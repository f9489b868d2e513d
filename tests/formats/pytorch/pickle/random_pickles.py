"""Random pickle programs that make sense for the most part: nested, shared, deep and strange values, in every place."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tests.formats.pytorch.pickle.bombs import (
    FLOATS,
    PLACES,
    VALUES,
    called,
    get,
    legacy_of,
    named,
    pushed,
    put,
    saved,
    storage,
)

CODES = storage(named("torch", "QInt8Storage"), pushed("1"), pushed(4096))

#: What may be called, with the kinds of its arguments.
_FUNCTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("collections", "OrderedDict", ()),
    ("collections", "OrderedDict", ("pairs",)),
    *((module, name, ("array",)) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")),
    ("_codecs", "encode", ("text", "latin1")),
    ("copyreg", "_reconstructor", ("name", "name", "value")),
    ("copyreg", "__newobj__", ("name", "value")),
    ("torch", "Size", ("sizes",)),
    ("torch._utils", "_rebuild_parameter", ("tensor", "empty", "empty")),
    ("torch._utils", "_rebuild_wrapper_subclass", ("name", "name", "sizes", "value", "value")),
    ("torch._tensor", "_rebuild_from_type_v2", ("wrapper", "name", "wrapped", "dictionary")),
    ("torch.jit._pickle", "build_intlist", ("value",)),
    ("torch.jit._pickle", "restore_type_tag", ("value", "text")),
    ("mine", "Net", ("value",)),
    ("torch.nn.modules.linear", "Linear", ()),
)
_CLASSES = (
    *(("torch", name) for name in ("float32", "qint8", "per_tensor_affine", "per_channel_affine", "ScriptObject")),
    *(("torch", name) for name in ("FloatStorage", "QInt8Storage", "UntypedStorage")),
    ("torchao.quantization", "Int8Tensor"),
    ("torch.ao.nn.quantized.modules.conv", "Conv2d"),
    ("__torch__.torch.classes.quantized", "LinearPackedParams"),
)
_TEXTS = (
    *(
        "storage",
        "0",
        "x",
        "weight",
        "bias",
        "state_dict",
        "model",
        "_modules",
        "_parameters",
        "_buffers",
        "cpu",
        "latin1",
    ),
    *("fc._packed_params", "a_all_weight_values.0.param", "weight_fake_quant", "weight_fake_quant.scale", "quant_min"),
    *("scale", "zero_point", "W_q", "\ud800", "meta", "bn.running_var", "f4", "<", "a\0b", "..", "", "training"),
)
_STRANGE = tuple(value for name, value in VALUES.items() if not {"deep", "100", "integer"} & set(name.split()))
_DEEP = (b")" + b"\x85" * 20_000, VALUES["a deep list"])

_SHORT, _LARGEST = 100, 400_000


class Maker:
    """Makes the opcodes of random values; those that it has put in the memo come again."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.kept = 0

    def value(self, depth: int = 0) -> bytes:
        """Opcodes that push one value."""
        made = self.random.choice(self.leaves if depth > 5 or self.random.random() < 0.3 else self.nodes)(self, depth)
        if self.random.random() < 0.3:
            made += put(self.kept)
            self.kept += 1
        return made

    def values(self, depth: int, most: int = 4) -> bytes:
        return b"".join(self.value(depth + 1) for _ in range(self.random.randrange(most + 1)))

    def number(self, _depth: int) -> bytes:
        number = self.random.choice((0, 1, 2, 3, 6, -1, 255, 1 << 20, 1 << 31, 1 << 62, 1 << 63, 1 << 200))
        return pushed(self.random.choice((number, float(number), True, 0.5)))

    def text(self, _depth: int) -> bytes:
        return pushed(self.random.choice(_TEXTS))

    def empty(self, _depth: int) -> bytes:
        return self.random.choice((b")", b"]", b"}", b"N", b"\x8f", b"\x88"))

    def name(self, _depth: int) -> bytes:
        return named(*self.random.choice(_CLASSES))

    def strange(self, _depth: int) -> bytes:
        return self.random.choice(_STRANGE) if self.random.random() < 0.3 else b"N"

    def deep(self, _depth: int) -> bytes:
        return self.random.choice(_DEEP) if self.random.random() < 0.1 else b"K\x01"

    def again(self, _depth: int) -> bytes:
        return get(self.random.randrange(self.kept)) if self.kept else b"N"

    def array(self, depth: int) -> bytes:
        values = self.values(depth)
        return b"](" + values * (50 if len(values) < _SHORT and self.random.random() < 0.2 else 1) + b"e"

    def row(self, depth: int) -> bytes:
        return b"(" + self.values(depth, 6) + b"t"

    def sizes(self, _depth: int) -> bytes:
        return pushed(tuple(self.random.choice((0, 1, 2, 3, 1 << 20)) for _ in range(self.random.randrange(4))))

    def dictionary(self, depth: int) -> bytes:
        pairs = b"".join(self.key(depth) + self.value(depth + 1) for _ in range(self.random.randrange(5)))
        return b"}(" + pairs + b"u"

    def key(self, depth: int) -> bytes:
        kind = self.random.random()
        if kind < 0.02:
            return self.value(depth + 3)
        return self.text(depth) if kind < 0.8 else self.scalar(depth) if kind < 0.95 else self.scalar(depth) + b"\x85"

    def scalar(self, depth: int) -> bytes:
        return self.random.choice((self.number, self.text, self.name))(depth)

    def group(self, depth: int) -> bytes:
        keys = b"".join(self.key(depth) for _ in range(self.random.randrange(5)))
        return self.random.choice((b"\x8f(" + keys + b"\x90", b"(" + keys + b"\x91"))

    def tensor(self, depth: int) -> bytes:
        """A tensor, each of whose arguments may be anything instead."""
        random, axes = self.random, self.random.randrange(4)
        size = tuple(random.choice((1, 2, 3, 5)) for _ in range(axes))
        strides = tuple(random.choice((0, 1, 3, 6)) for _ in range(axes))
        if random.random() < 0.05:
            size, strides = (*size, 1 << 20), (*strides, 0)
        is_quantized = random.random() < 0.3
        held = CODES if is_quantized else storage()
        arguments = [held, pushed(random.choice((0, 0, 1))), pushed(size), pushed(strides), b"\x89", b"}"]
        if is_quantized:
            arguments[4:4] = [self.quantizer(depth, len(size) and size[0])]
        if random.random() < 0.05:
            arguments[random.randrange(len(arguments))] = self.value(depth + 2)
        function = "_rebuild_qtensor" if is_quantized else "_rebuild_tensor_v2"
        return called("torch._utils", function, *arguments)

    def quantizer(self, depth: int, channels: int) -> bytes:
        scheme = "per_channel_affine" if self.random.random() < 0.5 and channels else "per_tensor_affine"
        parameters = [pushed(0.5), pushed(0)]
        if scheme == "per_channel_affine":
            parameters = [pushed([0.5] * channels), pushed([0] * channels), pushed(0)]
        if self.random.random() < 0.1:
            parameters[self.random.randrange(len(parameters))] = self.value(depth + 3)
        return b"(" + named("torch", scheme) + b"".join(parameters) + b"t"

    def pairs(self, depth: int) -> bytes:
        return b"](" + b"".join(self.key(depth) + self.value(depth + 2) + b"\x86" for _ in range(3)) + b"e"

    def latin1(self, _depth: int) -> bytes:
        return pushed("latin1")

    def wrapper(self, _depth: int) -> bytes:
        return named("torch._utils", "_rebuild_wrapper_subclass")

    def wrapped(self, depth: int) -> bytes:
        return b"(" + self.name(depth) + named("torch", "float32") + self.sizes(depth) + b"t"

    def call(self, depth: int) -> bytes:
        module, name, kinds = self.random.choice(_FUNCTIONS)
        arguments = b""
        for kind in kinds:
            arguments += self.value(depth + 1) if self.random.random() < 0.05 else getattr(self, kind)(depth + 1)
        made = named(module, name) + b"(" + arguments + b"t" + self.random.choice((b"R", b"R", b"\x81"))
        takes_state = name in ("Net", "Linear", "_reconstructor", "__newobj__", "OrderedDict")
        return made + (self.value(depth + 1) + b"b" if takes_state and self.random.random() < 0.5 else b"")

    def instance(self, depth: int) -> bytes:
        made = self.name(depth) + self.row(depth + 2) + b"\x81" + self.dictionary(depth + 1)
        return made + self.random.choice((b"b", b"N\x86b", b"2\x86b"))

    def place(self, depth: int) -> bytes:
        return self.value(depth + 1) + b"Q" if self.random.random() < 0.03 else self.tensor(depth)

    leaves = (number, text, empty, name, strange, deep, again, sizes)
    nodes = (array, row, dictionary, dictionary, group, tensor, tensor, call, call, instance, place, again)


def programs(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Files with random values, and some of them with damage; the names tell the seed of each."""
    places = tuple(PLACES.values())
    for number in range(seed, seed + count):
        random = Random(number)
        maker = Maker(random)
        value = maker.value() if random.random() < 0.5 else maker.dictionary(0)
        for _ in range(random.choice((0, 0, 0, 0, 0, 1, 2))):
            at = random.randrange(len(value))
            value = value[:at] + bytes([random.randrange(256)]) + value[at + random.randrange(2) :]
        kind = random.random()
        made = (
            random.choice(places)(value)
            if kind < 0.2
            else legacy_of(value)
            if kind < 0.25
            else saved(value, **{"1": FLOATS})
        )
        if len(made) < _LARGEST:
            yield f"{number // 100}: random pickle {number}", made


def some() -> Iterator[tuple[str, bytes]]:
    """Those that the tests read."""
    return programs(0, 400)


def many() -> Iterator[tuple[str, bytes]]:
    """Others, by hand."""
    return programs(1000, 20_000)
