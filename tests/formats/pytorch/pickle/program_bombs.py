"""Exported programs of up to some megabytes that ask for time or memory without end, each by another way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.formats.pytorch.pickle.bombs import saved, subclass, tensor, zipped

INT8, INT32, FLOAT32 = 2, 4, 7  # schema.ScalarType
_HUGE = 10**4000

Json = dict[str, Any]


def stored(
    path: str, sizes: Sequence[int], strides: Sequence[int], dtype: int = INT8, *, is_pickle: bool = False
) -> Json:
    """What a configuration says of a tensor."""
    numbers = {"sizes": sizes, "strides": strides}
    meta = {key: [{"as_int": size} for size in each] for key, each in numbers.items()}
    meta |= {"dtype": dtype, "layout": 7, "storage_offset": {"as_int": 0}}
    return {"path_name": path, "use_pickle": is_pickle, "tensor_meta": meta}


def node(operator: str, output: str, **inputs: Json) -> Json:
    given = [{"name": name, "arg": value} for name, value in inputs.items()]
    return {"target": f"torch.ops.{operator}", "inputs": given, "outputs": [of(output)], "metadata": {}}


def of(value: str) -> Json:
    return {"as_tensor": {"name": value}}


def dequantized(number: int, value: str = "p", scale: Json | None = None, **more: Json) -> Json:
    """A node that decodes a value with one scale, another one for each number."""
    limits = {"quant_min": {"as_int": -8}, "quant_max": {"as_int": 7}, "dtype": {"as_scalar_type": INT8}} | more
    scale = {"as_float": 1.0 + number} if scale is None else scale
    operator = "quantized_decomposed.dequantize_per_tensor.default"
    return node(operator, f"d{number}", input=of(value), scale=scale, zero_point={"as_int": 0}, **limits)


def program(nodes: Sequence[Json], names: Mapping[str, str], **more: Any) -> bytes:
    """A program; `names` are its values that are stored, with their names there."""
    specs = [{"parameter": {"arg": {"name": value}, "parameter_name": name}} for value, name in names.items()]
    signature = {"input_specs": specs, "output_specs": []}
    graph = {"nodes": nodes, "tensor_values": {}}
    document = {"graph_module": {"graph": graph, "signature": signature}, "opset_version": {"aten": 1}}
    return json.dumps(document | {"torch_version": "2.13"} | more).encode()


def package(nodes: Sequence[Json], tensors: Mapping[str, Json], model: str = "model", **more: Any) -> dict[str, bytes]:
    """The records of one program, whose first stored tensor is the value "p"."""
    return {
        "archive_format": b"pt2",
        f"models/{model}.json": program(nodes, {"p": next(iter(tensors))}, **more),
        f"data/weights/{model}_weights_config.json": json.dumps({"config": tensors}).encode(),
        f"data/constants/{model}_constants_config.json": b'{"config": {}}',
        "data/weights/w": b"\1" * (1 << 20),
    }


def programs() -> Iterator[tuple[str, bytes]]:
    """All of them."""
    small = {"_frozen_param0": stored("w", (1024, 1024), (1024, 1))}
    floats = {"w": stored("w", (512, 512), (512, 1), FLOAT32)}
    yield "programs: values made of those before them", zipped(package(list(_doubled()), floats))
    yield "programs: many weights of one name", zipped(package([dequantized(n) for n in range(4000)], small))
    tiny = {"_frozen_param0": stored("w", (2, 2), (2, 1))}
    yield "programs: many small weights of one name", zipped(package([dequantized(n) for n in range(4000)], tiny))
    long_name = {"n" * 500_000: stored("w", (2, 2), (2, 1))}
    yield "programs: many weights of a long name", zipped(package([dequantized(n) for n in range(4000)], long_name))
    yield "programs: scales of every element", zipped(package([_by_element(n) for n in range(1000)], small))
    wide = {"w": stored("w", (1 << 40,), (0,)), "x": stored("w", (1 << 40,), (0,))}
    yield "programs: a view without strides", zipped(package([], wide))
    many = {f"w{n}": stored("w", (1 << 20,), (0,)) for n in range(5000)}
    yield "programs: many views without strides", zipped(package([], many))
    tied = {f"w{n}": stored("w", (1 << 20,), (1,)) for n in range(5000)}
    yield "programs: a tensor under many names", zipped(package([], tied))
    pickled = {f"w{n}": stored("q", (), (), is_pickle=True) for n in range(5000)}
    yield "programs: a pickle under many names", zipped(package([], pickled) | {"data/weights/q": saved(_large())})
    endless = b"]" + b"".join(b"r" + bytes([n, 0, 0, 0]) + b"]" + b"h" + bytes([n]) + b"a" for n in range(200))
    bomb = {"w": stored("q", (), (), is_pickle=True)}
    yield "programs: a pickle that is a bomb", zipped(package([], bomb) | {"data/weights/q": saved(endless)})
    names = {f"w{n}": stored("w", (2,), (1,)) for n in range(5000)}
    other = package([], {"x": stored("w", (2,), (1,))}, "second")
    yield "programs: a long name of a model", zipped(other | package([], names, "m" * 60_000))
    axes = {"w": stored("w", (1,) * 100_000, (1,) * 100_000)}
    yield "programs: a tensor of many axes", zipped(package([], axes))
    yield "programs: a huge size", zipped(package([], {"w": stored("w", (_HUGE,), (0,))}))
    yield "programs: huge scales", zipped(package([dequantized(0, scale={"as_int": _HUGE})], small))
    yield "programs: a huge limit", zipped(package([dequantized(0, quant_min={"as_int": _HUGE})], small))
    ranges = {"s0": {"min_val": _HUGE, "max_val": -_HUGE}}
    yield "programs: huge ranges", zipped(package([], small, range_constraints=ranges))
    nested: Json = of("p")
    for _ in range(200):
        nested = {"as_tensors": [nested]}
    yield "programs: nested arguments", zipped(package([dequantized(0, more=nested)], small))
    inner: Json = dequantized(0)
    for number in range(100):
        inner = node("higher_order.cond", f"c{number}", graph={"as_graph": {"graph": {"nodes": [inner]}}})
    yield "programs: nested graphs", zipped(package([inner], small))


def _doubled() -> Iterator[Json]:
    """Nodes that quantize, each with the two before it among its inputs."""
    operator = "quantized_decomposed.quantize_per_tensor.default"
    numbers = {"scale": {"as_float": 1.0}, "zero_point": {"as_int": 0}}
    numbers |= {"quant_min": {"as_int": -8}, "quant_max": {"as_int": 7}, "dtype": {"as_scalar_type": INT8}}
    for number in range(60):
        before = of(f"q{number - 1}")
        yield node(operator, f"q{number}", input=of("p"), **numbers, first=before, second=before)


def _by_element(number: int) -> Json:
    numbers = {"scale": {"as_float": 1.0 + number}, "zero_point": {"as_int": 0}, "block_size": {"as_ints": [1, 1]}}
    limits = {"quant_min": {"as_int": -8}, "quant_max": {"as_int": 7}, "output_dtype": {"as_scalar_type": FLOAT32}}
    return node("torchao.dequantize_affine.default", f"d{number}", input=of("p"), **numbers, **limits)


def _large() -> bytes:
    """A tensor that wraps another one, after much that is thrown away."""
    return b"N0" * 300_000 + subclass(b"}X\x01\x00\x00\x00a" + tensor() + b"s")
