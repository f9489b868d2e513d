"""What the unpickler and the constructors refuse, opcode by opcode, each by its message; and that it ends."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from tests.formats.pytorch.pickle import bombs
from tests.formats.pytorch.pickle.bombs import (
    MAGIC,
    QUANTIZED,
    array,
    called,
    entry,
    get,
    legacy_of,
    legacy_parts,
    named,
    pushed,
    put,
    quantized,
    saved,
    storage,
    tensor,
)
from tests.growth import ends


def refused(folder: Path, content: bytes, message: str, kind: type[Error]) -> None:
    path = folder / "m.pt"
    path.write_bytes(content)
    with ends(), pytest.raises(kind, match=message) as caught:
        nibblecast.load(path)
    assert "m.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def length(count: int, opcode: bytes) -> bytes:
    return opcode + struct.pack("<i", count)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "a text of a negative length": (length(-5, b"T"), r"-5 more after \d+ are due"),
    "a text that goes back to its own opcode": (length(-6, b"T") + b"0", "-6 more after"),
    "a text longer than the pickle": (length(1000, b"T"), "1000 more after"),
    "a text one byte longer than the pickle": (length(2, b"T"), "2 more after"),
    "bytes longer than the pickle": (length(1 << 30, b"B"), f"{1 << 30} more after"),
    "an integer of a negative length": (length(-9, b"\x8b"), "-9 more after"),
    "an integer of too many bytes": (length(1 << 20, b"\x8b") + bytes(1 << 20), f"an integer of {1 << 20} bytes"),
    "an integer of too many digits": (b"L" + b"9" * 10_000 + b"L\n", r"an integer of \d+ digits"),
    "a line that does not end": (b"I123", "a line at byte 3 that does not end"),
    "a text without quotes": (b"Sabc\n", "without quotes"),
    "a text with one quote": (b"S'\n", "without quotes"),
    "an opcode that there is not": (b"\xff", "the unknown opcode 255 at byte 2"),
    "nothing": (b"", "damaged before byte"),
    "a mark where a value is due": (b"(", "a mark where a value is due"),
    "a mark that is remembered": (b"(" + put(0), "a mark where a value is due"),
    "a mark in a tuple": (b"(\x85", "a mark where a value is due"),
    "a tuple of fewer values": (b"N\x86", "fewer values"),
    "no mark": (b"Nt", "no mark"),
    "what is remembered under no number": (get(3), "damaged before byte 4 .IndexError"),
    "a negative number in the memo": (b"Np-1\n", "larger than the pickle"),
    "what is remembered under a negative number": (b"N" + put(0) + b"g-1\n", "nothing is remembered"),
    "what is remembered under a number that was left out": (b"N" + put(0) + b"N" + put(5) + get(3), "nothing is rem"),
    "a number in the memo larger than the pickle": (b"N" + put(1 << 30), "larger than the pickle"),
    "a call of no name": (b"N)R", "a call needs a name, not NoneType"),
    "a call without arguments": (named("mine", "f") + b"NR", "a call without arguments"),
    "a call with keywords that are none": (named("mine", "f") + b")N0]\x92", "a call without arguments"),
    "a state for a number": (pushed(1) + b")b", "a state needs an object, not int"),
    "appending to a number": (pushed(1) + b"Na", "appending to int"),
    "setting items of a list": (b"]NNs", "setting items of list"),
    "adding items to a list": (b"](N\x90", "adding items to list"),
    "a protocol to come": (b"\x80\x09N", "protocol 9"),
    "a name of numbers": (b"NN\x93", "names a class by"),
    "a name that is too long": (named("m" * 70_000, "f"), "names a class by"),
    "a dictionary of no pairs": (called("collections", "OrderedDict", b"]Na"), "a dictionary of"),
    "a dictionary of a number": (called("collections", "OrderedDict", b"K\x01"), "a collection needs a list, not int"),
    "a set of a number": (called("builtins", "set", b"K\x01"), "a collection needs a list, not int"),
    "bytes in an encoding that is no bytes'": (
        called("_codecs", "encode", pushed("x"), pushed("utf-16")),
        "the encoding",
    ),
    "bytes of a number": (called("_codecs", "encode", b"K\x01", pushed("latin1")), "the encoding"),
    "an object of no class": (
        called("copyreg", "_reconstructor", b"N", b"N", b"N"),
        "a class, not NoneType",
    ),
    "a size of a text": (called("torch", "Size", pushed("ab")), "a collection needs a list, not str"),
    "a key that is a list": (b"}]Ns", "a key of type list"),
    "a key of too many characters": (b"}" + pushed("k" * 70_000) + b"Ns", "a key of 70000 characters"),
    "a key of too many bits": (b"}" + length(200, b"\x8b") + b"\x7f" * 200 + b"Ns", r"integer of \d+ bits"),
    "a key of too many parts": (b"}(" + b"N" * 100 + b"tNs", "a tuple of 100, 0 deep"),
    "a key that is too deep": (b"}N" + b"\x85" * 40 + b"Ns", "a tuple of 1, .* deep"),
    "a key of parts that are too long": (b"}(" + pushed("k" * 40_000) * 2 + b"tNs", r"a key of \d+ characters"),
    "a tensor of too many dimensions": (entry(tensor(size=pushed((1,) * 70), stride=pushed((1,) * 70))), "counts are"),
    "a tensor of no size": (entry(tensor(size=b"N")), "of size None: up to"),
    "a tensor of a size that is a bool": (entry(tensor(size=b"(\x88K\x03t")), "size .*: counts are needed"),
    "a tensor over no storage": (entry(tensor(b"N")), "whose storage is NoneType"),
    "a tensor without a dtype": (
        entry(tensor(storage(named("torch", "UntypedStorage"), count=pushed(4096)))),
        "without a dtype",
    ),
    "a tensor of other strides": (entry(tensor(stride=pushed((1,)))), "they do not fit"),
    "a tensor at no offset": (entry(tensor(pushed("") * 0, b"N")), "they do not fit"),
    "a tensor that reaches too far": (entry(tensor(offset=pushed(1019))), "reaches element 1024 of a storage of 1024"),
    "a parameter of no tensor": (
        entry(called("torch._utils", "_rebuild_parameter", b"N", b"\x88", b"N")),
        "a parameter",
    ),
    "a wrapping tensor of no class": (
        entry(called("torch._utils", "_rebuild_wrapper_subclass", b"N", b"N", pushed((1,)))),
        "without a class or a dtype",
    ),
    "a quantizer of too few parameters": (entry(quantized(QUANTIZED, pushed(1.0))), "with the parameters"),
    "no storage": (pushed(("store", 1, 2, 3, 4)) + b"Q", "that is not a storage"),
    "a storage of part of an identifier": (pushed(("storage",)) + b"Q", "that is not a storage"),
    "a storage of a negative number of elements": (
        entry(tensor(storage(count=pushed(-1)))),
        "-1 elements under the key",
    ),
    "a storage in another folder": (entry(tensor(storage(key=pushed("../0")))), "under the key '../0'"),
    "a storage that claims too much": (
        entry(tensor(storage(count=pushed(1025)))),
        "has 4096 bytes, but claims .* 4100",
    ),
    "a storage of two sizes": (
        b"}(" + pushed("a") + tensor() + pushed("b") + tensor(storage(named("torch", "HalfStorage"))) + b"u",
        "both float32 and float16",
    ),
}

UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "codes of a registry": (b"\x82\x01", "private registry"),
    "buffers elsewhere": (b"\x97", "NEXT_BUFFER"),
    "a dtype that is not known": (
        entry(
            tensor(
                storage(),
                pushed(0),
                pushed((2,)),
                pushed((1,)),
                b"\x89",
                b"N",
                named("torch", "float3"),
                function="_rebuild_tensor_v3",
            )
        ),
        "dtype .*float3",
    ),
    "a conjugated tensor": (
        entry(tensor(storage(), pushed(0), pushed((2,)), pushed((1,)), b"\x89", b"N", entry(b"\x88", pushed("conj")))),
        "resolve_conj",
    ),
    "a negated tensor": (
        entry(tensor(storage(), pushed(0), pushed((2,)), pushed((1,)), b"\x89", b"N", entry(b"\x88", pushed("neg")))),
        "resolve_neg",
    ),
    "a tensor of a class that is not known": (
        entry(called("torch._tensor", "_rebuild_from_type_v2", named("mine", "f"), named("mine", "T"), b")", b"}")),
        "a tensor of class .*mine.T",
    ),
    "a storage of a class that is not known": (entry(tensor(storage(named("torch", "OddStorage")))), "OddStorage"),
    "a storage of another library": (entry(tensor(storage(named("mine", "FloatStorage")))), "mine.FloatStorage"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_pickle_that_is_damaged(what: str, tmp_path: Path) -> None:
    opcodes, message = DAMAGED[what]
    refused(tmp_path, saved(opcodes), message, CorruptFile)


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_a_pickle_that_is_not_supported(what: str, tmp_path: Path) -> None:
    opcodes, message = UNSUPPORTED[what]
    refused(tmp_path, saved(opcodes), message, Unsupported)


FIRST = (MAGIC, pushed(1001), entry(b"\x88", pushed("little_endian")))
ELEMENTS = struct.pack("<q", 1024) + bytes(4096)
LIST = b"]" + pushed("0") + b"a"


@pytest.mark.parametrize(
    ("content", "message", "kind"),
    [
        (b"\x81\x02N.", r"begins with b'\\x81", CorruptFile),
        (legacy_parts(pushed(7)) + b"more", "a pickle of another kind", CorruptFile),
        (legacy_parts(MAGIC, pushed(1000), b"}", b"}", b"]"), "protocol 1000; 1001 is read", Unsupported),
        (legacy_parts(MAGIC, pushed(1001), b"N", b"}", b"]"), "big-endian", Unsupported),
        (
            legacy_parts(MAGIC, pushed(1001), entry(b"\x89", pushed("little_endian")), b"}", b"]"),
            "big-endian",
            Unsupported,
        ),
        (legacy_parts(*FIRST, entry(tensor()), b"]"), "other storages than its tensors need", CorruptFile),
        (legacy_parts(*FIRST, entry(tensor()), b"N"), "other storages than its tensors need", CorruptFile),
        (
            legacy_parts(*FIRST, entry(tensor()), LIST) + struct.pack("<q", 7) + bytes(4096),
            "has 7 elements",
            CorruptFile,
        ),
        (legacy_parts(*FIRST, entry(tensor()), LIST) + ELEMENTS[:-1], "truncated", CorruptFile),
        (
            legacy_parts(
                *FIRST,
                entry(tensor(storage(named("torch", "FloatStorage"), pushed("0"), pushed(1024), b"K\x01"))),
                LIST,
            )
            + ELEMENTS,
            "a view of a storage that is 1",
            CorruptFile,
        ),
        (
            legacy_parts(
                *FIRST,
                entry(
                    tensor(storage(named("torch", "FloatStorage"), pushed("0"), pushed(1024), pushed(("v", 1000, 25))))
                ),
                LIST,
            )
            + ELEMENTS,
            "a view of 25 elements at 1000 of a storage of 1024",
            CorruptFile,
        ),
    ],
)
def test_a_file_of_several_pickles(content: bytes, message: str, kind: type[Error], tmp_path: Path) -> None:
    refused(tmp_path, content, message, kind)


def test_a_view_up_to_the_end_of_a_storage_is_read(tmp_path: Path) -> None:
    view = storage(named("torch", "FloatStorage"), pushed("0"), pushed(1024), pushed(("v", 1018, 6)))
    (tmp_path / "m.pt").write_bytes(legacy_parts(*FIRST, entry(tensor(view)), LIST) + ELEMENTS)
    assert nibblecast.load(tmp_path / "m.pt")["x"].shape == (2, 3)
    (tmp_path / "m.pt").write_bytes(saved(entry(tensor(offset=pushed(1018)))))
    assert nibblecast.load(tmp_path / "m.pt")["x"].shape == (2, 3)


def test_a_byte_order_that_is_not_read(tmp_path: Path) -> None:
    content = bombs.zipped(
        {"data.pkl": b"\x80\x02" + entry(tensor()) + b".", "byteorder": b"big", "data/0": bombs.FLOATS}
    )
    refused(tmp_path, content, "byte order .*big.*: only little", Unsupported)


def test_bytes_as_protocol_2_writes_them_are_read(tmp_path: Path) -> None:
    """All encodings that stand for bytes."""
    for name in ("latin1", "latin-1", "ascii"):
        opcodes = array().replace(pushed("latin1"), pushed(name))
        (tmp_path / "m.pt").write_bytes(saved(entry(opcodes)))
        assert nibblecast.load(tmp_path / "m.pt")["x"].shape == (3,)


def test_a_tar_archive(tmp_path: Path) -> None:
    content = bytearray(1024)
    content[257:262] = b"ustar"
    refused(tmp_path, bytes(content), "tar archive of PyTorch before 0.1.10", Unsupported)


def test_a_pickle_of_many_pickles_is_as_a_single_one(tmp_path: Path) -> None:
    refused(tmp_path, legacy_of(length(-5, b"T")), "-5 more after", CorruptFile)
