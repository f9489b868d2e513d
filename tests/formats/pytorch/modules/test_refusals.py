"""What is refused of PyTorch's own quantized tensors, of NumPy's arrays and of state dicts, each by its message."""

from __future__ import annotations

from pathlib import Path

import pytest

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error, Unsupported
from tests.formats.pytorch.pickle.bombs import (
    FLOATS,
    QUANTIZED,
    array,
    called,
    entry,
    named,
    pushed,
    quantized,
    saved,
    storage,
    tensor,
)
from tests.growth import ends

CHANNELS = named("torch", "per_channel_affine")
#: In a storage of its own: one storage has one dtype.
ONE_AXIS = tensor(storage(key=pushed("1")), size=pushed((2,)), stride=pushed((1,)))
NIBBLES = storage(named("torch", "QUInt4x2Storage"), count=pushed(4096))


def floats(kind: str, count: int) -> bytes:
    held = storage(named("torch", f"{kind}Storage"), pushed("1"), count=pushed(4096 // {"Half": 2, "Double": 8}[kind]))
    return tensor(held, size=pushed((count,)), stride=pushed((1,)))


REFUSED: dict[str, tuple[bytes, str, type[Error]]] = {
    "a scale that is not a number": (
        quantized(QUANTIZED, pushed(1), pushed(0)),
        "the scale 1 and the zero point 0",
        CorruptFile,
    ),
    "a zero point that is not an integer": (
        quantized(QUANTIZED, pushed(1.0), pushed(0.0)),
        "numbers are needed",
        CorruptFile,
    ),
    "a zero point of 33 bits": (
        quantized(QUANTIZED, pushed(1.0), pushed(1 << 31)),
        "zero point 2147483648: 32 bits",
        CorruptFile,
    ),
    "an axis that there is not": (
        quantized(CHANNELS, ONE_AXIS, ONE_AXIS, pushed(2)),
        "along axis 2 of shape",
        CorruptFile,
    ),
    "an axis before the first": (
        quantized(CHANNELS, ONE_AXIS, ONE_AXIS, pushed(-1)),
        "along axis -1 of shape",
        CorruptFile,
    ),
    "scales of another number": (
        quantized(CHANNELS, ONE_AXIS, ONE_AXIS, pushed(1)),
        "2 of scale for 3 channels",
        CorruptFile,
    ),
    "scales of float16": (
        quantized(CHANNELS, floats("Half", 2), floats("Half", 2), pushed(0)),
        "scales of float16",
        CorruptFile,
    ),
    "scales that are no tensor": (
        quantized(CHANNELS, pushed("ab"), ONE_AXIS, pushed(0)),
        "a scale that is not a tensor but str",
        CorruptFile,
    ),
    "zero points that no dtype holds": (
        quantized(CHANNELS, pushed([1.0, 2.0]), pushed([1 << 70, 0]), pushed(0)),
        "a zero_point that no dtype",
        CorruptFile,
    ),
    "a view of nibbles": (
        tensor(
            NIBBLES,
            pushed(2),
            pushed((2, 3)),
            pushed((3, 1)),
            b"(" + QUANTIZED + pushed(1.0) + pushed(0) + b"t",
            function="_rebuild_qtensor",
        ),
        "a view of packed quint4x2: save it after clone",
        Unsupported,
    ),
    "an array of another shape": (
        array(pushed((4,))),
        r"NumPy array of shape .*4.*, which does not fit its 12 bytes",
        CorruptFile,
    ),
    "an array of a negative size": (array(pushed((-3,))), "NumPy array of shape", CorruptFile),
    "an array of no elements that is too large": (
        array(pushed((0, 1 << 62, 1 << 62))).replace(pushed("\0" * 12), pushed("")),
        "which no memory holds",
        CorruptFile,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_tensor_that_is_refused(what: str, tmp_path: Path) -> None:
    opcodes, message, kind = REFUSED[what]
    (tmp_path / "m.pt").write_bytes(saved(entry(opcodes), **{"1": FLOATS}))
    with ends(), pytest.raises(kind, match=message) as caught:
        nibblecast.load(tmp_path / "m.pt")
    assert "\n" not in str(caught.value)


def test_quantized_tensors_that_are_read(tmp_path: Path) -> None:
    """By the same makers: along each axis, with scales as numbers and as tensors, with the largest zero points."""
    for quantizer, shape in (
        ((QUANTIZED, pushed(0.5), pushed((1 << 31) - 1)), (1, 1)),
        ((QUANTIZED, pushed(0.5), pushed(-(1 << 31))), (1, 1)),
        ((CHANNELS, pushed([1.0, 2.0]), pushed([0, 1]), pushed(0)), (2, 1)),
        ((CHANNELS, floats("Double", 2), pushed([0, 1]), pushed(0)), (2, 1)),
        ((CHANNELS, pushed([1.0, 2.0, 3.0]), pushed([0, 1, 2]), pushed(1)), (1, 3)),
    ):
        (tmp_path / "m.pt").write_bytes(saved(entry(quantized(*quantizer)), **{"1": FLOATS}))
        found = nibblecast.load(tmp_path / "m.pt")["x"].quantization
        assert found is not None
        assert found.scale.shape == shape


def test_a_parameter_of_a_class_that_is_not_known(tmp_path: Path) -> None:
    made = called(
        "torch._tensor", "_rebuild_from_type_v2", named("torch._utils", "nothing"), named("m", "T"), b")", b"}"
    )
    (tmp_path / "m.pt").write_bytes(saved(entry(made)))
    with pytest.raises(Unsupported, match="made by .*nothing"):
        nibblecast.load(tmp_path / "m.pt")
