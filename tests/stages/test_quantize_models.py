"""Quantizing whole models: which tensors, through every writer, in bounded memory, and against onnxruntime."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import nibblecast
from nibblecast.converters.arithmetic.packing import unpack
from nibblecast.converters.conversion import convert_model
from nibblecast.converters.errors import UsageError
from nibblecast.converters.ir import Loss, Model, Quantization, Tensor
from nibblecast.converters.metadata import Activation, Use
from nibblecast.converters.stages.quantize import quantize_model, quantized
from nibblecast.converters.stages.scheme import Scheme, parse_scheme
from nibblecast.converters.storage import Computed, Data
from tests import zoo
from tests.formats.cheader.c_harness import assert_same_values, walked

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tflite"
FLOATS = [FIXTURES / f"{name}.tflite" for name in ("mlp_float32", "mlp_float16", "sparse_float32")]
INT4 = FIXTURES / "cnn_int4_per_channel.tflite"
INT8 = FIXTURES / "cnn_int8_full.tflite"
PAGE = 1 << 12


def plain(name: str, shape: tuple[int, ...], dtype: Any = np.float32, uses: tuple[Use, ...] = ()) -> Tensor:
    return replace(zoo.codes(name, shape, dtype), uses=uses)


def block_shape(tensor: Tensor) -> tuple[int, ...]:
    assert tensor.quantization is not None
    return tensor.quantization.block_shape


def onnx_model(path: Path, **arrays: NDArray[Any]) -> Path:
    """A chain of MatMuls."""
    nodes = [helper.make_node("MatMul", [f"x{i}", name], [f"x{i + 1}"]) for i, name in enumerate(arrays)]
    first, *_, last = (None, *(array.shape for array in arrays.values()))[-len(arrays) :] * 2
    ends = [
        helper.make_tensor_value_info(f"x{i}", onnx.TensorProto.FLOAT, [1, size])
        for i, size in ((0, first[0]), (len(arrays), last[1]))
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


class TestWhichTensors:
    def test_weights_where_uses_are_known(self) -> None:
        use = Use("any product", 1, 0, sum_axes=(1,))
        model = zoo.model(
            [
                plain("weight", (4, 8), uses=(use,)),
                plain("half", (4, 8), np.float16, uses=(Use("ADD", 0), use)),
                plain("wide", (4, 8), np.float64, uses=(use,)),
                plain("brain", (4, 8), ml_dtypes.bfloat16, uses=(use,)),
                plain("bias", (4,), uses=(Use("any product", 2),)),
                plain("constant", (4, 8), uses=(Use("ADD", 1),)),
                plain("unused", (4, 8)),
                plain("indices", (4, 8), np.int32, uses=(use,)),
                plain("small float", (4, 8), ml_dtypes.float8_e4m3fn, uses=(use,)),
                plain("empty", (0, 8), uses=(use,)),
            ]
        )
        found = quantize_model(model, Scheme(np.dtype(np.int8)))
        assert [n for n, t in found.items() if t.quantization] == ["weight", "half", "wide", "brain"]
        assert all(found[name] is model[name] for name in found if found[name].quantization is None)
        assert all((t.name, t.shape, t.uses) == (n, model[n].shape, model[n].uses) for n, t in found.items())
        assert found.losses == ()

    def test_all_matrices_where_no_use_is_known(self) -> None:
        model = zoo.model([plain("a", (4, 8)), plain("b", (8,)), plain("c", (2, 3, 4), np.float16)])
        found = quantize_model(model, parse_scheme("int4"))
        assert {name for name, tensor in found.items() if tensor.quantization} == {"a", "c"}

    def test_what_is_quantized_already_stays_unless_asked(self) -> None:
        model = zoo.model([zoo.quantized("q", (4, 8), (1, 8)), plain("f", (4, 8))])
        found = quantize_model(model, parse_scheme("int8"))
        assert found["q"] is model["q"]
        assert found["f"].dtype == np.int8
        again = quantize_model(model, parse_scheme("int8,block=4,requantize"))
        assert again.losses == (
            Loss("q", "requantized", "requantized from int4, per-axis 0 to int8, blockwise (1, 4)"),
        )
        as_floats = Tensor.from_array("q", model["q"].dequantize(np.float32))
        np.testing.assert_array_equal(again["q"].codes(), quantized(as_floats, parse_scheme("int8,block=4")).codes())

    def test_requantizing_a_weight_of_integer_kernels_says_that_its_bias_does_not_fit(self) -> None:
        activation = Activation(np.dtype(np.int8), (1, 8), 0.5, 0)
        weight = zoo.quantized("q", (4, 8), (1, 8))
        model = zoo.model([replace(weight, uses=(Use("FULLY_CONNECTED", 1, 0, activation, activation, (1,)),))])
        (loss,) = quantize_model(model, parse_scheme("int4,mse,requantize")).losses
        assert "bias keeps its scale" in loss.detail

    def test_parameters_that_are_tensors_go_with_their_owner(self) -> None:
        scale = replace(plain("scale", (4, 1)), parameter_of="q")
        weight = Tensor(
            "q", (4, 8), np.dtype(np.int8), zoo.codes("q", (4, 8), np.int8).data, Quantization(scale, (1, 8))
        )
        model = zoo.model([weight, scale, plain("f", (4, 8))])
        assert quantize_model(model, parse_scheme("int4"))["scale"] is scale
        assert list(quantize_model(model, parse_scheme("int4,requantize"))) == ["q", "f"]

    @pytest.mark.parametrize("text", ["int4", "int4,requantize"])
    def test_nothing_to_quantize_is_an_error(self, text: str) -> None:
        with pytest.raises(UsageError, match="the model has no float weight"):
            quantize_model(zoo.model([plain("b", (8,))]), parse_scheme(text))

    @pytest.mark.parametrize(
        ("tensors", "text", "message"),
        [
            ([plain("b", (8,))], "int4", r"with at least two axes\)$"),
            ([plain("b", (8,))], "int4,requantize", r"with at least two axes\)$"),
            ([plain("c", (4, 8), uses=(Use("sum", 1),))], "int4", "an operator is known to take as its weight$"),
            ([zoo.quantized("q", (4, 8), (1, 8))], "int4", "yet; add ',requantize' to include quantized ones$"),
            ([plain("w", (4, 8)), plain("v", (4, 8))], "int4,only=x", "names; without .* it has 2$"),
            (
                [zoo.quantized("q", (4, 8), (1, 8))],
                "int4,requantize,except=q",
                "names; without .* it has 1$",
            ),
        ],
    )
    def test_the_error_says_what_would_help(self, tensors: list[Tensor], text: str, message: str) -> None:
        with pytest.raises(UsageError, match=f"quantize '.*': the model has no float weight.*{message}"):
            quantize_model(zoo.model(tensors), parse_scheme(text))

    @pytest.mark.parametrize(
        ("use", "shape", "channels", "blocks"),
        [
            (Use("lookup", 0, sum_axes=()), (64, 96), (1, 96), (1, 32)),
            (Use("product", 1, 0, sum_axes=(1,)), (64, 96), (1, 96), (1, 32)),
            (Use("product", 1, 1, sum_axes=(0,)), (64, 96), (64, 1), (32, 1)),
            (Use("product", 1, 2, sum_axes=(1,)), (3, 64, 96), (3, 64, 1), (1, 32, 1)),
            (Use("convolution", 1, 0, sum_axes=(1, 2, 3)), (8, 64, 3, 3), (1, 64, 3, 3), (1, 32, 1, 1)),
            (Use("convolution", 1, 0, sum_axes=(3, 1, 2)), (8, 3, 3, 64), (1, 3, 3, 64), (1, 1, 1, 32)),
            (Use("convolution", 1, 3, sum_axes=(2, 1)), (1, 3, 64, 8), (1, 3, 64, 1), (1, 1, 32, 1)),
        ],
        ids=str,
    )
    def test_axes_are_those_of_the_operator(
        self, use: Use, shape: tuple[int, ...], channels: tuple[int, ...], blocks: tuple[int, ...]
    ) -> None:
        model = zoo.model([plain("w", shape, uses=(use,))])
        assert block_shape(quantize_model(model, parse_scheme("int4"))["w"]) == channels
        assert block_shape(quantize_model(model, parse_scheme("int4,block=32"))["w"]) == blocks

    def test_axes_as_given(self) -> None:
        model = zoo.model([plain("w", (64, 96), uses=(Use("MatMul", 1, 1, sum_axes=(0,)),))])
        assert block_shape(quantize_model(model, parse_scheme("int4,axis=0"))["w"]) == (1, 96)
        assert block_shape(quantize_model(model, parse_scheme("int4,block=32,axis=-1"))["w"]) == (1, 32)
        assert block_shape(quantize_model(model, parse_scheme("int4,block=1000,axis=1"))["w"]) == (1, 96)
        assert block_shape(quantize_model(model, parse_scheme("int4,per-tensor"))["w"]) == (64, 96)
        with pytest.raises(UsageError, match=r"shape \(64, 96\) has no axis 2"):
            quantize_model(model, parse_scheme("int4,axis=2"))


class TestConversions:
    @pytest.mark.parametrize("source", FLOATS, ids=lambda path: path.stem)
    @pytest.mark.parametrize(
        "text", ["int4", "int4,block=8,mse,scale=float16", "uint4,block=5", "int2,narrow", "int8,per-tensor,asymmetric"]
    )
    def test_every_writer_takes_them(self, source: Path, text: str, tmp_path: Path) -> None:
        targets = [tmp_path / name for name in ("w.safetensors", "w.onnx", "w.h")]
        done = nibblecast.convert(source, *targets, quantize=text, verify=True)
        assert all(comparison is not None and comparison.equal for comparison in done.verified.values())
        model = quantize_model(nibblecast.load(source), parse_scheme(text))
        names = [name for name, tensor in model.items() if tensor.quantization]
        assert names
        assert [each.tensor for each in done.quantized] == names
        for target in targets:
            assert nibblecast.verify(model, target).quantized == len(names)
        assert_same_values(walked("gcc c99", [tmp_path / "w.h", tmp_path / "w.c"], "w"), model)

    def test_from_onnx_and_safetensors(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        arrays = {name: rng.normal(size=(48, 48)).astype(np.float32) for name in "ab"}
        source = onnx_model(tmp_path / "m.onnx", **arrays)
        nibblecast.convert(source, tmp_path / "plain.safetensors")
        for path in (source, tmp_path / "plain.safetensors"):
            done = nibblecast.convert(path, tmp_path / "w.h", quantize="int4,block=16,axis=0,asymmetric", verify=True)
            assert [each.tensor for each in done.quantized] == ["a", "b"]
            read = nibblecast.load(tmp_path / "w.h")
            for name, array in arrays.items():
                expected = quantized(Tensor.from_array(name, array), parse_scheme("int4,block=16,axis=0,asymmetric"))
                np.testing.assert_array_equal(read[name].dequantize(), expected.dequantize())

    def test_the_error_is_reported_for_each_tensor(self, tmp_path: Path) -> None:
        done = nibblecast.convert(FLOATS[0], tmp_path / "w.safetensors", quantize="int4,mse")
        floats, written = nibblecast.load(FLOATS[0]), nibblecast.load(tmp_path / "w.safetensors")
        assert done.quantized
        for each in done.quantized:
            values = floats[each.tensor].dequantize().astype(np.float64)
            errors = written[each.tensor].dequantize() - values
            assert each.elements == errors.size
            assert each.max_error == np.abs(errors).max().astype(np.float32)
            assert each.mean_square_error == pytest.approx(np.square(errors).mean(), rel=1e-5)
            ratio = 10 * np.log10(np.square(values).sum() / np.square(errors).sum())
            assert each.signal_to_noise == pytest.approx(ratio, abs=1e-4)

    def test_a_scheme_is_taken_as_well_as_its_text(self, tmp_path: Path) -> None:
        nibblecast.convert(FLOATS[0], tmp_path / "a.safetensors", quantize="int4,block=8")
        nibblecast.save(nibblecast.load(FLOATS[0]), tmp_path / "b.safetensors", quantize=parse_scheme("int4,block=8"))
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    def test_not_together_with_dequantize(self, tmp_path: Path) -> None:
        with pytest.raises(
            UsageError, match="use either dequantize or quantize: 'int4,per-channel,symmetric,requantize'"
        ):
            nibblecast.convert(INT4, tmp_path / "w.h", quantize="int4", dequantize="float32")

    def test_the_files_of_the_floats_are_still_inputs(self, tmp_path: Path) -> None:
        onnx_model(tmp_path / "m.onnx", a=np.ones((64, 64), np.float32))
        proto = onnx.load(tmp_path / "m.onnx")
        onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="data.h", size_threshold=0)
        with pytest.raises(UsageError, match="is both the input and an output"):
            nibblecast.convert(tmp_path / "m.onnx", tmp_path / "data.h", quantize="int4")

    def test_requantizing_is_a_loss_and_quantizing_is_none(self, tmp_path: Path) -> None:
        target = tmp_path / "w.safetensors"
        assert not nibblecast.convert(FLOATS[0], target, quantize="int4", fail_on_loss=True).losses
        with pytest.raises(nibblecast.converters.errors.RefusedLoss, match="requantized"):
            nibblecast.convert(INT8, target, quantize="int4,requantize", fail_on_loss=True)
        done = nibblecast.convert(INT8, target, quantize="int4,requantize", verify=True)
        assert {loss.kind for loss in done.losses} == {"requantized"}

    def test_progress_counts_the_bytes_that_are_written(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        nibblecast.convert(
            FLOATS[0], tmp_path / "w.safetensors", quantize="int4", progress=lambda *each: seen.append(each)
        )
        read = nibblecast.load(tmp_path / "w.safetensors").values()
        total = sum(data.nbytes for tensor in read for data in tensor.stored())  # scales, too
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)


class TestCommandLine:
    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nibblecast", "convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_a_table_of_errors(self, tmp_path: Path) -> None:
        done = self.run(FLOATS[0], tmp_path / "w.h", "--quantize", "int4,block=8", "--verify")
        assert done.returncode == 0, done.stderr
        assert "mlp_1/dense_1_1/MatMul  int4, block=8" in done.stdout
        assert "all 2 tensors" in done.stdout

    def test_json(self, tmp_path: Path) -> None:
        done = self.run(FLOATS[0], tmp_path / "w.safetensors", "--quantize", "uint4", "--json")
        (first, second) = json.loads(done.stdout)["quantized"]
        assert first["to"] == "uint4, per-channel"
        assert second["signal_to_noise_db"] > 10
        assert second["mean_square_error"] < second["max_error"]

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (("--quantize", "int5"), "'int5' is not one of"),
            (("--quantize", "int4", "--dequantize"), "use either dequantize or quantize"),
            (("--quantize", "int4", "--only", "*Bias*"), "the model has no float weight"),
        ],
    )
    def test_usage(self, arguments: tuple[str, ...], why: str, tmp_path: Path) -> None:
        done = self.run(FLOATS[0], tmp_path / "w.h", *arguments)
        assert done.returncode == 2
        assert why in done.stderr
        assert len(done.stderr.splitlines()) == 1


class Source(Data):
    """Floats that are made when they are read; how many are read at a time, and how many are not released."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape))
        self.largest = self.total = self.most_resident = 0
        self.nbytes = 4 * size
        self.resident = np.zeros(-(-self.nbytes // PAGE), np.bool_)
        self.pattern = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
        self.tensor = Tensor("w", shape, np.dtype(np.float32), self)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        self.largest = max(self.largest, stop - start)
        self.total += stop - start
        self.resident[start // PAGE : -(-stop // PAGE)] = True
        self.most_resident = max(self.most_resident, int(self.resident.sum()) * PAGE)
        first = start // 4 % self.pattern.size
        return np.resize(np.roll(self.pattern, -first)[: (stop - start) // 4], (stop - start) // 4).view(np.uint8)

    def release(self, start: int, stop: int) -> None:
        self.resident[start // PAGE : -(-stop // PAGE)] = False


class TestMemory:
    @pytest.mark.parametrize(
        ("text", "passes"),
        [
            ("int4,block=32", 1),
            ("int4,block=32,axis=0", 1),
            ("uint4,block=64", 1),
            ("int8,axis=0", 1),
            ("int4,axis=1", 2),
            ("int4,per-tensor", 2),
            ("int4,block=4096,axis=0", 2),
        ],
    )
    def test_large_tensors_are_read_in_pieces_and_once_for_each_pass(self, text: str, passes: int) -> None:
        source = Source((4096, 8192))  # 128 MiB
        tensor = quantized(source.tensor, parse_scheme(text))
        assert source.total == 0
        tracemalloc.start()
        for part in tensor.parts(1 << 20):
            part.packed()
        assert tensor.quantization is not None
        for _, parameter in tensor.quantization.parameters():
            for part in parameter.parts(1 << 20):
                part.packed()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert source.largest <= 1 << 19
        assert source.most_resident <= 20 << 20
        assert peak < 48 << 20
        # a part ends within a group now and then
        assert passes * tensor.size * 4 <= source.total <= 1.15 * passes * tensor.size * 4

    def test_planning_reads_nothing(self, tmp_path: Path) -> None:
        def refuse(start: int, stop: int) -> NDArray[np.uint8]:
            raise AssertionError("payload was read")

        tensor = Tensor("w", (1 << 20, 1 << 20), np.dtype(np.float32), Computed(1 << 42, refuse))
        done = convert_model(
            Model({"w": tensor}),
            [tmp_path / name for name in ("w.safetensors", "w.onnx", "w.h")],
            quantize=parse_scheme("int4,block=32"),
            dry_run=True,
            options={},
        )
        assert done.quantized == ()
        assert all(file.nbytes is not None for file in done.files)

    def test_what_was_found_is_let_go_once_written(self, tmp_path: Path) -> None:
        model = quantize_model(zoo.model([plain("w", (64, 64))]), parse_scheme("int4"))
        nibblecast.save(model, tmp_path / "w.safetensors")
        assert not model["w"].data._fitted  # type: ignore[attr-defined]

    def test_several_sinks_share_one_computation(self, tmp_path: Path) -> None:
        source = Source((256, 256))
        model = quantize_model(Model({"w": source.tensor}), parse_scheme("int4"))
        targets = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
        convert_model(model, targets, options={})
        assert source.total == source.tensor.nbytes


class TestAgainstOnnxruntime:
    """Its quantizers of weights for MatMulNBits: round to nearest, in blocks along K of a weight [K, N]."""

    @staticmethod
    def theirs(folder: Path, array: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
        """The values that its codes, scales and zero points stand for."""
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        proto = onnx.load(onnx_model(folder / "m.onnx", W=array))
        block = getattr(config, "block_size", 32)
        quantizer = MatMulNBitsQuantizer(proto, block_size=block, algo_config=config)
        quantizer.process()
        (node,) = quantizer.model.graph().node
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        k, n, bits, block = (attributes[name] for name in ("K", "N", "bits", "block_size"))
        stored = {i.name: numpy_helper.to_array(i) for i in quantizer.model.graph().initializer}
        dtype = np.dtype({2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}[bits])

        def elements(packed: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
            flat = packed.reshape(n, -1)
            rows = flat if bits == 8 else np.stack([unpack(row, dtype, row.size * 8 // bits) for row in flat])
            return rows[:, :columns]

        grid = -(-k // block)
        codes = elements(stored[node.input[1]], k).astype(np.float32)
        scale = stored[node.input[2]].reshape(n, grid).repeat(block, axis=1)[:, :k]
        zero_point = np.full((n, grid), 1 << (bits - 1), np.float32)
        if len(node.input) > 3 and node.input[3]:
            zero_point = elements(stored[node.input[3]], grid).astype(np.float32)
        return np.ascontiguousarray(((codes - zero_point.repeat(block, axis=1)[:, :k]) * scale).T)

    @staticmethod
    def ours(array: NDArray[np.float32], text: str) -> float:
        tensor = quantized(Tensor.from_array("W", array), parse_scheme(text))
        return error(array, tensor.dequantize())

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("block", [32, 128])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("tails", ["normal", "heavy"])
    def test_default(self, bits: int, block: int, symmetric: bool, tails: str, tmp_path: Path) -> None:
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig

        rng = np.random.default_rng(bits)
        array = (rng.normal(size=(256, 192)) if tails == "normal" else rng.standard_t(4, (256, 192))).astype(np.float32)
        config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
        theirs = error(array, self.theirs(tmp_path, array, config))
        text = f"int{bits},block={block},axis=0,{'symmetric' if symmetric else 'asymmetric'}"
        assert self.ours(array, text) <= theirs * (1 + 1e-7)
        assert self.ours(array, f"{text},mse") < theirs * 0.97

    def test_rtn_and_k_quant(self, tmp_path: Path) -> None:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            KQuantWeightOnlyQuantConfig,
            RTNWeightOnlyQuantConfig,
        )

        array = np.random.default_rng(0).normal(size=(256, 192)).astype(np.float32)
        rtn = error(array, self.theirs(tmp_path, array, RTNWeightOnlyQuantConfig()))
        k_quant = error(array, self.theirs(tmp_path, array, KQuantWeightOnlyQuantConfig()))
        assert self.ours(array, "int4,block=32,axis=0,asymmetric") <= rtn * (1 + 1e-7)
        assert self.ours(array, "int4,block=32,axis=0,asymmetric,mse") <= k_quant


def error(floats: NDArray[Any], values: NDArray[Any]) -> float:
    return float(np.square(values.astype(np.float64) - floats).mean())
