"""Where the weights of a quantized checkpoint are not yet those of the float model that transformers has.

    gpt-oss's experts (MXFP4)   are stored as (E, O, I), where the float model has (E, I, O)
    ModelOpt's pre_quant_scale  multiplies a layer's inputs, which the float model does not: it goes into the weight

transformers 5.23, integrations/mxfp4.py; nvidia-modelopt 0.47. Applies to models of floats only.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nibblecast.converters.arithmetic.dtypes import is_float
from nibblecast.converters.ir import Loss, Model, Tensor
from nibblecast.converters.storage import Computed, Joined
from nibblecast.formats.encodings.bytes.column_blocks import ColumnBlocks
from nibblecast.formats.encodings.modelopt import read as modelopt
from nibblecast.formats.encodings.mxfp4 import read as mxfp4

_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
_PRE_QUANT_SCALE = ".pre_quant_scale"


def as_float_model(model: Model) -> tuple[Model, tuple[Loss, ...]]:
    """The model as transformers takes it, and what was lost by that; a model with any quantized weight as it is."""
    if any(tensor.quantization is not None for tensor in model.values()):
        return model, ()
    if model.metadata.producer in mxfp4.METHODS:
        return _with_transposed_experts(model), ()
    if model.metadata.producer in modelopt.METHODS:
        return _with_scaled_inputs(model)
    return model, ()


def unheld_scales(model: Model, layout: str) -> list[Loss]:
    """What is lost where codes of layers whose inputs are scaled are stored in a layout that has no such scales."""
    detail = f"stays a tensor, which libraries of the layout {layout} do not multiply the layer's inputs by"
    return [Loss(name, "reinterpreted", detail) for name in model if name.endswith(_PRE_QUANT_SCALE)]


def _with_transposed_experts(model: Model) -> Model:
    tensors = {
        name: _transposed(tensor) if name.endswith(_EXPERTS) and len(tensor.shape) == 3 else tensor
        for name, tensor in model.items()
    }
    return replace(model, tensors=tensors)


def _transposed(tensor: Tensor) -> Tensor:
    """Each matrix of a tensor of three axes transposed."""
    experts, rows, columns = tensor.shape
    planes = []
    for number in range(experts):
        one = tensor.rows(number, number + 1) if experts > 1 else tensor
        plane = replace(one, shape=(rows, columns))
        planes.append(ColumnBlocks(plane, 1, rows * tensor.dtype.itemsize, np.transpose))
    return replace(tensor, shape=(experts, columns, rows), data=Joined(tuple(planes)))


def _with_scaled_inputs(model: Model) -> tuple[Model, tuple[Loss, ...]]:
    tensors, losses = dict(model.tensors), []
    for name, scale in model.items():
        weight = tensors.get(f"{name.removesuffix(_PRE_QUANT_SCALE)}.weight")
        if not name.endswith(_PRE_QUANT_SCALE) or weight is None or not is_float(weight.dtype):
            continue
        if len(weight.shape) != 2 or scale.shape != weight.shape[-1:]:
            continue
        tensors[weight.name] = replace(weight, data=_scaled(weight, scale))
        del tensors[name]
        losses.append(Loss(weight.name, "rounded", "the pre_quant_scale of its inputs is multiplied into it"))
    return replace(model, tensors=tensors), tuple(losses)


def _scaled(weight: Tensor, scale: Tensor) -> Computed:
    itemsize, columns = weight.dtype.itemsize, weight.shape[1]

    def compute(start: int, stop: int) -> NDArray[np.uint8]:
        first, last = start // itemsize, -(-stop // itemsize)
        values = weight.data.read(first * itemsize, last * itemsize).view(weight.dtype).astype(np.float32)
        with np.errstate(over="ignore"):
            values *= scale.dequantize(np.float32)[np.arange(first, last) % columns]
            return values.astype(weight.dtype).view(np.uint8)[start - first * itemsize : stop - first * itemsize]

    return Computed(weight.nbytes, compute, (weight.data,))
