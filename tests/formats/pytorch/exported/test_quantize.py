"""Float programs are quantized as their state dicts are: the reader knows what the operators' sums run over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import nibblecast
from nibblecast.formats.pytorch.exported.operators import input_of
from nibblecast.formats.pytorch.exported.program import ProgramNode


@pytest.mark.parametrize(
    ("operator", "name", "channels", "sums"),
    [
        ("aten.linear", "weight", 0, (1,)),
        ("aten.linear", "bias", 0, None),
        ("aten.conv2d", "weight", 0, (1, 2, 3)),
        ("aten.conv_transpose2d", "weight", 1, (0,)),
        ("aten.mm", "mat2", 3, (2,)),
        ("aten.embedding", "weight", None, ()),
        ("aten.lstm", "params", None, (1,)),
        ("aten.add", "other", None, None),
    ],
)
def test_what_operators_do_with_their_inputs(operator, name, channels, sums):
    use = input_of(ProgramNode(operator, "", (), (), ""), name).use(operator, 1, range(4))
    assert (use.channel_axis, use.sum_axes) == (channels, sums)


def saved(torch, module, given, folder: Path) -> tuple[Path, Path]:
    """The module's state dict and its program."""
    torch.save(module.state_dict(), folder / "m.pt")
    torch.export.save(torch.export.export(module.eval(), (given,)), folder / "m.pt2")
    return folder / "m.pt", folder / "m.pt2"


@pytest.mark.peers
def test_a_program_of_linear_layers_gives_the_codes_of_its_state_dict_and_computes(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    given = torch.randn(2, 64)
    state, program = saved(torch, module, given, tmp_path)
    for source, target in ((state, "a.safetensors"), (program, "b.safetensors"), (program, "c.onnx")):
        done = nibblecast.convert(source, tmp_path / target, quantize="int4,block=32", verify=True)
        assert [accuracy.tensor for accuracy in done.quantized] == ["0.weight", "2.weight"]
    expected = nibblecast.load(tmp_path / "a.safetensors")
    for target in ("b.safetensors", "c.onnx"):
        found = nibblecast.load(tmp_path / target)
        for name in ("0.weight", "2.weight"):
            np.testing.assert_array_equal(found[name].codes(), expected[name].codes())
            scales = [model[name].quantization.scale.numpy() for model in (found, expected)]
            assert scales[0].tobytes() == scales[1].tobytes()
            module.get_parameter(name).data = torch.from_numpy(found[name].dequantize().copy())
    session = ort.InferenceSession(tmp_path / "c.onnx", providers=["CPUExecutionProvider"])
    (computed,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    np.testing.assert_allclose(computed, module(given).detach().numpy(), atol=1e-5)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:The tensor attributes")  # of LSTM, when it is exported
def test_convolutions_embeddings_and_recurrent_weights_of_a_program_are_quantized(tmp_path):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = torch.nn.Embedding(10, 64)
            self.conv = torch.nn.Conv1d(64, 8, 3)
            self.lstm = torch.nn.LSTM(8, 4, batch_first=True)

        def forward(self, given):
            return self.lstm(self.conv(self.rows(given).transpose(1, 2)).transpose(1, 2))[0]

    _, program = saved(torch, Net(), torch.zeros(2, 6, dtype=torch.long), tmp_path)
    nibblecast.convert(program, tmp_path / "m.safetensors", quantize="int4,block=32", verify=True)
    found = nibblecast.load(tmp_path / "m.safetensors")
    blocks = {name: tensor.quantization.block_shape for name, tensor in found.items() if tensor.quantization}
    assert blocks == {
        "rows.weight": (1, 32),
        "conv.weight": (1, 32, 1),
        "lstm.weight_ih_l0": (1, 8),
        "lstm.weight_hh_l0": (1, 4),
    }
