"""Files that torch writes here and now, read by both. No process of ours imports torch: these tests do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]

DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
FIXTURES = Path(__file__).parents[3] / "fixtures" / "pytorch"


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="pip install torch==2.13.0")


def drawn_tensor(torch: Any, data: st.DataObject) -> Any:
    """A tensor of some dtype, and a view of it: permuted, sliced, expanded."""
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    tensor = (torch.randn(shape) * 100).to(getattr(torch, data.draw(st.sampled_from(DTYPES))))
    if shape and data.draw(st.booleans()):
        tensor = tensor.permute(*data.draw(st.permutations(range(len(shape)))))
    if shape and data.draw(st.booleans()):
        axis = data.draw(st.integers(0, len(shape) - 1))
        size = tensor.shape[axis]
        start = data.draw(st.integers(0, size))
        tensor = tensor.narrow(axis, start, data.draw(st.integers(0, size - start)))
    if data.draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


@given(data=st.data())
@settings(max_examples=60)
def test_any_tensor_comes_out_as_torch_loads_it(torch: Any, data: st.DataObject, tmp_path_factory: Any) -> None:
    state = {f"layer{number}.weight": drawn_tensor(torch, data) for number in range(data.draw(st.integers(1, 4)))}
    path = Path(tmp_path_factory.getbasetemp()) / "drawn.pt"
    zipped = data.draw(st.booleans())
    protocol = data.draw(st.sampled_from([2, 3, 4, 5]))
    torch.save(state, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    model = nibblecast.load(path)
    loaded = torch.load(path, weights_only=False)  # our own file; weights_only knows protocol 2 alone
    assert list(model) == list(loaded)
    for name, tensor in loaded.items():
        assert model[name].shape == tuple(tensor.shape)
        if tensor.dtype == torch.bfloat16:
            assert model[name].dtype.name == "bfloat16"
            np.testing.assert_array_equal(model[name].dequantize(np.float32), tensor.float().numpy())
        else:
            np.testing.assert_array_equal(model[name].numpy(), tensor.numpy())


@given(data=st.data())
@settings(max_examples=60)
def test_any_quantized_tensor_decodes_as_torch_decodes_it(
    torch: Any, data: st.DataObject, tmp_path_factory: Any
) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    x = torch.randn(shape) * 10
    dtype = getattr(torch, data.draw(st.sampled_from(["qint8", "quint8", "qint32"])))
    zeros = st.integers(-100, 100) if dtype != torch.quint8 else st.integers(0, 255)
    scale = st.floats(1e-5, 10)  # so that codes stay below 2 ** 24, from where on torch rounds them first
    if data.draw(st.booleans()):
        tensor = torch.quantize_per_tensor(x, data.draw(scale), data.draw(zeros), dtype)
    else:
        axis = data.draw(st.integers(0, len(shape) - 1))
        scales = torch.tensor([data.draw(scale) for _ in range(shape[axis])], dtype=torch.float64)
        zero_points = torch.tensor([data.draw(zeros) for _ in range(shape[axis])])
        tensor = torch.quantize_per_channel(x, scales, zero_points, axis, dtype)
    path = Path(tmp_path_factory.getbasetemp()) / "quantized.pt"
    torch.save({"weight": tensor}, path)
    weight = nibblecast.load(path)["weight"]
    np.testing.assert_array_equal(weight.codes(), tensor.int_repr().numpy())
    np.testing.assert_array_equal(weight.dequantize(np.float32), tensor.dequantize().numpy())


@given(data=st.data())
@settings(max_examples=40)
def test_weights_in_training_are_what_the_fake_quantizer_makes_of_them(
    torch: Any, data: st.DataObject, tmp_path_factory: Any
) -> None:
    from torch.ao import quantization as aoq

    per_channel, symmetric = data.draw(st.booleans()), data.draw(st.booleans())
    bits, signed = data.draw(st.sampled_from([2, 4, 8])), data.draw(st.booleans())
    observer = aoq.MovingAveragePerChannelMinMaxObserver if per_channel else aoq.MovingAverageMinMaxObserver
    scheme = f"per_{'channel' if per_channel else 'tensor'}_{'symmetric' if symmetric else 'affine'}"
    fake = aoq.FakeQuantize.with_args(
        observer=observer,
        quant_min=-(1 << bits - 1) if signed else 0,
        quant_max=(1 << bits - 1) - 1 if signed else (1 << bits) - 1,
        dtype=torch.qint8 if signed else torch.quint8,
        qscheme=getattr(torch, scheme),
    )
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    linear = torch.nn.Linear(data.draw(st.integers(4, 9)), 3)
    linear.qconfig = aoq.QConfig(activation=torch.nn.Identity, weight=fake)
    trained = torch.ao.nn.qat.Linear.from_float(linear)
    trained(torch.randn(2, linear.in_features))
    trained.weight_fake_quant.disable_observer()
    wanted = trained.weight_fake_quant(trained.weight).detach().numpy()
    path = Path(tmp_path_factory.getbasetemp()) / "training.pt"
    torch.save(trained.state_dict(), path)
    weight = nibblecast.load(path, bits=bits)["weight"]
    assert weight.quantization is not None
    np.testing.assert_array_equal(weight.dequantize(np.float32), wanted)


def test_no_process_of_ours_imports_torch(torch: Any) -> None:
    files = [str(path) for path in sorted(FIXTURES.glob("*.pt*"))]
    program = (
        "import sys, nibblecast\n"
        "for path in sys.argv[1:]:\n"
        "    for tensor in nibblecast.load(path).values():\n"
        "        tensor.packed()\n"
        "print([name for name in ('torch', 'torchao') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
