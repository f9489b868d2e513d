"""What the GGUF writer gives: exactly the values that it gets, or one sentence."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters import plugins
from nibblecast.converters.errors import Unsupported
from nibblecast.converters.ir import Model, Quantization, Tensor, blocked, per_axis, per_tensor
from nibblecast.converters.metadata import Metadata
from nibblecast.converters.pipeline import Target, fit
from nibblecast.converters.storage import MappedFile
from nibblecast.formats.gguf.container import open_container
from nibblecast.formats.gguf.writer import GGUFOptions, GGUFWriter
from tests import zoo

FIXTURES = Path(__file__).parents[3] / "fixtures"
FORMAT = plugins.format_named("gguf")
FLOAT4, E8M0, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def write(model: Model, path: Path, options: GGUFOptions | None = None) -> Any:
    """As the pipeline does; the plan."""
    return zoo.write(
        GGUFWriter(), fit(model, GGUFWriter.capabilities, Target(path, FORMAT)), path, options or GGUFOptions()
    )


def scales(shape: tuple[int, ...], dtype: Any = np.float16, seed: int = 3) -> Tensor:
    """Float16 numbers, in any dtype that holds them."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float16)
    if np.dtype(dtype) == BF16:
        values = values.astype(BF16).astype(np.float16)
    return Tensor.from_array("scale", values.astype(dtype))


def whole(values: Any, dtype: Any = np.int8) -> Tensor:
    return Tensor.from_array("zero_point", np.array(values, dtype))


def quantized(dtype: Any, shape: tuple[int, ...], block_shape: tuple[int, ...], scale: Tensor, **parts: Any) -> Tensor:
    return replace(zoo.codes("w", shape, dtype), quantization=Quantization(scale, block_shape, **parts))


def bits(patterns: Any, dtype: Any) -> Tensor:
    """Numbers by their bit patterns."""
    return Tensor.from_array("scale", np.array(patterns, f"u{np.dtype(dtype).itemsize}").view(dtype))


FINITE = [pattern for pattern in range(1 << 16) if pattern & 0x7C00 != 0x7C00]
EVERY_FLOAT16 = Tensor.from_array(
    "scale", bits(FINITE + FINITE[:2048], np.float16).numpy().reshape(16, 4096).astype(np.float32)
)
S = (4, 128)
IN_32, IN_64 = blocked(S, 1, 32), blocked(S, 1, 64)
HALVES = Tensor.from_array("offset", np.array([[0.5, -2], [4, 0.25], [1, 0], [-8, 2]], np.float32))
POWERS = Tensor.from_array("scale", np.array([[0.25, 4], [1, 2.0**-5], [8, 2], [1, 1]], np.float32))
CODEBOOK = Tensor.from_array("codebook", np.array(IQ4, np.float64))

#: A tensor, the type that it becomes, and the dtype of the codes that are read again.
WRITTEN: dict[str, tuple[Tensor, str, Any]] = {
    "int4": (quantized(ml_dtypes.int4, S, IN_32, scales((4, 4))), "Q4_0", ml_dtypes.int4),
    "int4 per tensor": (
        quantized(ml_dtypes.int4, S, per_tensor(S), scales((1, 1), np.float32)), "Q4_0", ml_dtypes.int4
    ),
    "int4 per row": (quantized(ml_dtypes.int4, S, per_axis(S, 0), scales((4, 1), BF16)), "Q4_0", ml_dtypes.int4),
    "int4 of two rows": (quantized(ml_dtypes.int4, S, (2, 64), scales((2, 2))), "Q4_0", ml_dtypes.int4),
    "int4, zeros": (
        quantized(ml_dtypes.int4, S, IN_64, scales((4, 2)), zero_point=whole(np.zeros((4, 2)))), "Q4_0", ml_dtypes.int4
    ),
    "uint4 minus 8": (
        quantized(ml_dtypes.uint4, S, IN_32, scales((4, 4)), zero_point=whole(np.full((4, 4), 8), np.float32)),
        "Q4_0",
        ml_dtypes.int4,
    ),
    "uint4": (quantized(ml_dtypes.uint4, S, IN_32, scales((4, 4))), "Q4_1", ml_dtypes.uint4),
    "uint4 minus others": (
        quantized(ml_dtypes.uint4, S, IN_64, POWERS, zero_point=whole(np.arange(8).reshape(4, 2))),
        "Q4_1",
        ml_dtypes.uint4,
    ),
    "uint4 minus a float": (
        quantized(ml_dtypes.uint4, S, IN_64, POWERS, zero_point=whole(np.full((4, 2), 7.5), np.float16)),
        "Q4_1",
        ml_dtypes.uint4,
    ),
    "int4 with offset": (quantized(ml_dtypes.int4, S, IN_64, POWERS, offset=HALVES), "Q4_1", ml_dtypes.uint4),
    "int4 with both": (
        quantized(ml_dtypes.int4, S, IN_64, POWERS, offset=HALVES, zero_point=whole(np.full((4, 2), -3))),
        "Q4_1",
        ml_dtypes.uint4,
    ),
    "int2": (quantized(ml_dtypes.int2, S, IN_64, scales((4, 2))), "Q4_0", ml_dtypes.int4),
    "uint2 minus many": (
        quantized(ml_dtypes.uint2, S, IN_32, scales((4, 4)), zero_point=whole(np.arange(16).reshape(4, 4) % 9 - 4)),
        "Q4_0",
        ml_dtypes.int4,
    ),
    "uint2 with offset": (quantized(ml_dtypes.uint2, S, IN_64, POWERS, offset=HALVES), "Q4_1", ml_dtypes.uint4),
    "int8": (quantized(np.int8, S, per_axis(S, 0), scales((4, 1))), "Q8_0", np.int8),
    "uint8 minus 128": (
        quantized(np.uint8, S, IN_32, scales((4, 4)), zero_point=whole(np.full((4, 4), 128), np.uint8)), "Q8_0", np.int8
    ),
    "iq4": (quantized(ml_dtypes.uint4, S, IN_32, scales((4, 4)), codebook=CODEBOOK), "IQ4_NL", ml_dtypes.uint4),
    "mxfp4": (quantized(FLOAT4, S, IN_32, zoo.codes("s", (4, 4), E8M0)), "MXFP4", FLOAT4),
    "mxfp4, every scale": (
        quantized(FLOAT4, (255, 32), (1, 32), bits(np.arange(255).reshape(255, 1), E8M0)), "MXFP4", FLOAT4
    ),
    "nvfp4, every scale": (
        quantized(FLOAT4, (127, 64), (1, 64), bits(np.arange(127).reshape(127, 1), E4M3)), "NVFP4", FLOAT4
    ),
    "every float16": (
        quantized(ml_dtypes.int4, (16, 131072), blocked((16, 131072), 1, 32), EVERY_FLOAT16), "Q4_0", ml_dtypes.int4
    ),
    "float4, powers of two": (quantized(FLOAT4, S, IN_64, POWERS), "MXFP4", FLOAT4),
    "nvfp4": (
        quantized(FLOAT4, S, blocked(S, 1, 16), whole(np.arange(32).reshape(4, 8) / 8, E4M3)), "NVFP4", FLOAT4
    ),
    "float4 in sixteens, powers of two": (
        quantized(FLOAT4, S, blocked(S, 1, 16), whole(np.full((4, 8), 0.5), np.float32)), "NVFP4", FLOAT4
    ),
    "float4 in sixteens, E8M0": (
        quantized(FLOAT4, S, blocked(S, 1, 16), whole(np.full((4, 8), 4), E8M0)), "NVFP4", FLOAT4
    ),
    "float4 in blocks of 48": (
        quantized(FLOAT4, (2, 192), (2, 48), whole(np.arange(4).reshape(1, 4) / 4, np.float16)), "NVFP4", FLOAT4
    ),
    "float4 per tensor": (quantized(FLOAT4, S, per_tensor(S), whole([[1.25]], np.float32)), "NVFP4", FLOAT4),
    "three axes": (
        quantized(ml_dtypes.int4, (3, 2, 64), per_axis((3, 2, 64), 1), scales((1, 2, 1))), "Q4_0", ml_dtypes.int4
    ),
    "a second-level scale": (
        quantized(
            ml_dtypes.int4,
            S,
            IN_64,
            replace(whole(np.full((4, 2), 3)), quantization=Quantization(whole([[0.5]], np.float16), (4, 2))),
        ),
        "Q4_0",
        ml_dtypes.int4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_values_are_those_that_were_given(case: str, tmp_path: Path) -> None:
    tensor, type_name, dtype = WRITTEN[case]
    path = tmp_path / "w.gguf"
    plan = write(zoo.model([tensor]), path)
    read = nibblecast.load(path)
    assert read["w"].dtype == dtype
    assert plan.shards[0].entries[0].kind.name == type_name
    np.testing.assert_array_equal(read["w"].dequantize(np.float32), tensor.dequantize(np.float32))
    zoo.assert_identical(read, plan.expected)


@pytest.mark.peers
@pytest.mark.parametrize("case", WRITTEN)
def test_gguf_reads_the_same_values(case: str, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensor, type_name, _ = WRITTEN[case]
    path = tmp_path / "w.gguf"
    write(zoo.model([tensor]), path)
    (read,) = GGUFReader(path).tensors
    with np.errstate(over="ignore"):  # 2 ** 127 times 6
        values = dequantize(read.data, read.tensor_type)
    assert (read.name, read.tensor_type.name) == ("w", type_name)
    assert tuple(reversed(read.shape.tolist())) == tensor.shape
    np.testing.assert_array_equal(values, tensor.dequantize(np.float32))


@pytest.mark.peers
@pytest.mark.parametrize("case", ["int4", "int2", "uint4", "uint4 minus others", "int8", "uint8 minus 128"])
def test_mlx_reads_the_same_values(case: str, tmp_path: Path) -> None:
    """It has a reader of its own, in C, and turns blocks into its own encoding: scales and biases of 32."""
    import mlx.core as mx

    tensor = replace(WRITTEN[case][0], name="w.weight")
    path = tmp_path / "w.gguf"
    write(zoo.model([tensor]), path)
    read = mx.load(str(path))
    scale, bias = (read[f"w.{role}"].astype(mx.float32) for role in ("scales", "biases"))
    values = mx.dequantize(read["w.weight"], scale, bias, group_size=32, bits=max(4, tensor.bits))
    np.testing.assert_array_equal(np.array(values), tensor.dequantize(np.float32))


@pytest.mark.peers
def test_gguf_reads_plain_values_bit_for_bit(tmp_path: Path) -> None:
    from gguf import GGUFReader

    dtypes = (np.float32, np.float16, BF16, np.float64, np.int8, np.int16, np.int32, np.int64)
    tensors = [zoo.codes(np.dtype(dtype).name, (2, 3, 1, 5), dtype) for dtype in dtypes]
    tensors += [Tensor.from_array("scalar", np.array(1.5, np.float32)), zoo.codes("x" * 63, (7,), np.int8)]
    path = tmp_path / "plain.gguf"
    write(zoo.model(tensors), path)
    read = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert list(read) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        assert tuple(reversed(read[tensor.name].shape.tolist())) == tensor.shape
        assert read[tensor.name].data.tobytes() == tensor.packed().tobytes()
    assert [read[name].tensor_type.name for name in ("float32", "bfloat16", "int64")] == ["F32", "BF16", "I64"]


REFUSED: dict[str, tuple[Tensor, str]] = {
    "scale": (
        quantized(ml_dtypes.int4, S, IN_32, whole(np.full((4, 4), 0.1), np.float32)),
        r"the scale 0\.1, which float16 \(Q4_0\) does not hold: .*--dequantize float16.*"
        "--quantize int4,block=32,axis=-1,scale=float16,requantize",
    ),
    "large scale": (quantized(np.int8, S, IN_32, whole(np.full((4, 4), 1e5), np.float32)), "the scale 100000.0"),
    "offset": (
        quantized(ml_dtypes.int4, S, per_tensor(S), whole([[2.0**-20]], np.float16), offset=whole([[0.5]], np.float16)),
        "the minimum 0.499.* does not give exactly",
    ),
    "minimum": (
        quantized(ml_dtypes.uint4, S, per_tensor(S), whole([[0.1]], np.float16), zero_point=whole([[7]])),
        "does not give exactly",
    ),
    "far zero point": (
        quantized(
            ml_dtypes.uint4, S, per_tensor(S), whole([[2.0**-24]], np.float16), zero_point=whole([[2**26]], np.int64)
        ),
        "does not give exactly",
    ),
    "blocks": (quantized(ml_dtypes.int4, S, blocked(S, 1, 16), scales((4, 8))), r"for blocks of \(1, 16\)"),
    "per column": (quantized(ml_dtypes.int4, S, per_axis(S, 1), scales((1, 128))), r"for blocks of \(4, 1\)"),
    "half a block": (
        quantized(ml_dtypes.int4, (4, 48), (4, 48), scales((1, 1))), "the last size 48.* float32., or leave it out"
    ),
    "scalar": (quantized(ml_dtypes.int4, (), (), scales(())), "no axes"),
    "int8 with an offset": (quantized(np.int8, S, IN_64, POWERS, offset=HALVES), "not symmetric"),
    "uint8": (quantized(np.uint8, S, IN_64, POWERS), "not symmetric"),
    "wide codes": (quantized(np.int16, S, IN_64, POWERS), "codes of int16"),
    "codebook": (
        quantized(ml_dtypes.uint4, S, IN_64, POWERS, codebook=whole(np.arange(16), np.float32)), "codebook that is not"
    ),
    "no number": (quantized(FLOAT4, S, per_tensor(S), whole([[np.nan]], E8M0)), "the scale nan"),
    "negative": (quantized(FLOAT4, S, per_tensor(S), whole([[-1]], np.float32)), r"the scale -1\.0"),
    "float4 with offset": (quantized(FLOAT4, S, IN_64, POWERS, offset=HALVES), "float4 codes with"),
    "plain int4": (zoo.codes("w", S, ml_dtypes.int4), "plain int4 values, .*--skip"),
    "plain bool": (zoo.codes("w", S, np.bool_), "bool values: .*--skip"),
    "float8 codes": (quantized(E4M3, S, IN_64, POWERS), "float8_e4m3fn codes: add --dequantize"),
    "five axes": (zoo.codes("w", (1,) * 5, np.float32), "5 axes, and ggml takes 4"),
    "nothing": (zoo.codes("w", (0, 4), np.float32), "no elements"),
    "long name": (zoo.codes("x" * 64, (4,), np.float32), "a name of 64 bytes"),
    "zero byte": (zoo.codes("a\0b", (4,), np.float32), "zero byte"),
    "surrogate": (zoo.codes("\udc80", (4,), np.float32), "not Unicode"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_ggml_does_not_hold_is_refused_with_what_to_do(case: str, tmp_path: Path) -> None:
    tensor, message = REFUSED[case]
    with pytest.raises(Unsupported, match=message) as caught:
        write(zoo.model([tensor]), tmp_path / "w.gguf")
    assert caught.value.tensor == tensor.name
    assert "--skip" in str(caught.value) or "--dequantize" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_of_the_zoo_is_held_exactly_or_refused(tmp_path: Path) -> None:
    held, path = set(), tmp_path / "one.gguf"
    for name, tensor in zoo.zoo().items():
        try:
            write(zoo.model([tensor]), path)
        except Unsupported as error:
            assert error.tensor == name
            assert "--" in str(error)
            continue
        read = nibblecast.load(path)[name]
        held.add(name)
        if tensor.quantization is None:
            assert read.packed().tobytes() == tensor.packed().tobytes()
        else:
            np.testing.assert_array_equal(read.dequantize(np.float32), tensor.dequantize(np.float32))
    assert {"plain float32", "plain int64", "plain ()", "special float64"} <= held


@pytest.mark.parametrize("advice", ["dequantize", "quantize"])
def test_doing_what_a_refusal_says_helps(advice: str, tmp_path: Path) -> None:
    cases = (
        "scale",
        "offset",
        "minimum",
        "blocks",
        "per column",
        "int8 with an offset",
        "uint8",
        "codebook",
        "negative",
    )
    source, target = tmp_path / "w.safetensors", tmp_path / "w.gguf"
    nibblecast.save(zoo.model(replace(REFUSED[case][0], name=case) for case in cases), source)
    with pytest.raises(Unsupported) as caught:
        nibblecast.convert(source, target)
    _, _, wanted = str(caught.value).partition(f"--{advice} ")
    keywords = {advice: wanted.split()[0].rstrip(",")}
    comparison = nibblecast.convert(source, target, verify=True, **keywords).verified[target]
    assert comparison is not None
    assert comparison.equal
    assert comparison.tensors == len(cases)


@pytest.mark.peers
def test_a_checkpoint_in_mxfp4_has_the_values_that_gguf_decodes(tmp_path: Path) -> None:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    source = FIXTURES / "checkpoints" / "mxfp4"
    target = tmp_path / "experts.gguf"
    comparison = nibblecast.convert(source, target, verify=True).verified[target]
    assert comparison is not None
    assert comparison.equal
    model = nibblecast.load(source)
    read = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
    quantized = [name for name, tensor in model.items() if tensor.quantization is not None]
    assert len(quantized) == 2
    for name in quantized:
        assert read[name].tensor_type.name == "MXFP4"
        values = dequantize(read[name].data, read[name].tensor_type)
        np.testing.assert_array_equal(values, model[name].dequantize(np.float32))


def test_parameters_that_are_tensors_of_their_own_are_in_the_blocks_only(tmp_path: Path) -> None:
    owner = quantized(ml_dtypes.int4, S, IN_64, replace(scales((4, 2)), name="s", parameter_of="w"))
    path = tmp_path / "w.gguf"
    write(zoo.model([owner, owner.quantization.scale]), path)
    assert list(nibblecast.load(path)) == ["w"]


def test_codes_of_two_bits_are_a_loss(tmp_path: Path) -> None:
    plan = write(zoo.model([WRITTEN["int2"][0], replace(WRITTEN["int4"][0], name="other")]), tmp_path / "w.gguf")
    assert [(loss.tensor, loss.kind) for loss in plan.losses] == [("w", "widened")]


def test_a_tensor_in_several_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nibblecast.formats.gguf import fit, writer

    cases = {case: tensor for case, (tensor, *_) in WRITTEN.items() if tensor.size < 1 << 16}
    long = quantized(ml_dtypes.uint4, (1, 4096), (1, 64), scales((1, 64)), zero_point=whole(np.full((1, 64), 8)))
    tensors = [replace(tensor, name=name) for name, tensor in {**cases, "long": long}.items()]
    write(zoo.model(tensors), tmp_path / "whole.gguf")
    monkeypatch.setattr(writer, "_PIECE_BYTES", 64)
    monkeypatch.setattr(fit, "_PIECE_BLOCKS", 3)
    write(zoo.model(tensors), tmp_path / "pieces.gguf")
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_the_header_has_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    model = replace(zoo.model([WRITTEN["int4"][0]]), metadata=Metadata("tflite", source=Path("models/größe.tflite")))
    plan = write(model, path, GGUFOptions(architecture="flux"))
    container = open_container(MappedFile.open(path))
    assert {key: value.value for key, value in container.metadata.items()} == {
        "general.architecture": "flux",
        "general.name": "größe",
        "general.file_type": 2,
        "general.quantization_version": 2,
    }
    assert "convert_hf_to_gguf.py" in plan.notes[0]


@pytest.mark.peers
def test_the_file_is_what_gguf_writes(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType
    from gguf import GGUFWriter as LibraryWriter

    tensor = WRITTEN["int4"][0]
    tensors = [replace(tensor, name="a"), zoo.codes("b", (3, 5), np.float32), replace(tensor, name="c")]
    write(zoo.model(tensors), tmp_path / "ours.gguf", GGUFOptions(architecture="llama"))
    ours = open_container(MappedFile.open(tmp_path / "ours.gguf"))
    library = LibraryWriter(tmp_path / "theirs.gguf", "llama")
    library.add_file_type(2)
    library.add_quantization_version(2)
    for name, info in ours.tensors.items():
        if info.type_id == 0:
            library.add_tensor(name, tensors[1].numpy())
        else:
            blocks = ours.data_of(info, 4 * 4 * 18).read(0, 288).reshape(4, 72)
            library.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    library.write_header_to_file()
    library.write_kv_data_to_file()
    library.write_tensors_to_file()
    library.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


_FLOATS = st.floats(width=16, allow_nan=False, allow_infinity=False)
_WHOLE = {"int4": 16, "uint4": 16, "int2": 4, "uint2": 4, "int8": 256}


@settings(max_examples=150)
@given(st.data())
def test_random_codes_scales_and_shapes_come_back(data: st.DataObject) -> None:
    """Whatever is written has the values that it was given; symmetric codes with float16 scales are always written."""
    name = data.draw(st.sampled_from(sorted(_WHOLE)))
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    rows, blocks, per_scale = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    shape = (rows, 32 * blocks)
    grid = (rows, -(-blocks // per_scale))
    raw = data.draw(st.binary(min_size=rows * 32 * blocks, max_size=rows * 32 * blocks))
    codes = np.frombuffer(raw, np.int8).reshape(shape)
    if name != "int8":
        low = codes.view(np.uint8) % _WHOLE[name]
        codes = low if name.startswith("u") else (low.astype(np.int8) - np.int8(_WHOLE[name] // 2))
    count = grid[0] * grid[1]
    scale = np.array(data.draw(st.lists(_FLOATS, min_size=count, max_size=count)), np.float32).reshape(grid)
    zero_point = None
    if data.draw(st.booleans()) and name != "int8":
        points = data.draw(st.lists(st.integers(-9, 17), min_size=count, max_size=count))
        zero_point = whole(np.array(points).reshape(grid))
    quantization = Quantization(Tensor.from_array("scale", scale), (1, 32 * per_scale), zero_point)
    tensor = Tensor.from_array("w", codes.astype(dtype), quantization)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.gguf"
        try:
            plan = write(zoo.model([tensor]), path)
        except Unsupported:
            assert zero_point is not None or name.startswith("u")
            return
        read = nibblecast.load(path)
        np.testing.assert_array_equal(read["w"].dequantize(np.float32), tensor.dequantize(np.float32))
        zoo.assert_identical(read, plan.expected)
