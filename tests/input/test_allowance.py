"""The allowance for data that are larger than the files that they come from."""

from __future__ import annotations

import numpy as np
import pytest

from nibblecast.converters.errors import Unsupported, UsageError
from nibblecast.converters.input.allowance import VARIABLE, Allowance
from nibblecast.converters.ir import Quantization, Tensor

MIB = 1 << 20


def test_small_files_may_grow_by_256_mib_altogether() -> None:
    allowance = Allowance(100)
    allowance.spend(200 * MIB, "repeats its elements")
    allowance.spend(56 * MIB, "repeats its elements")
    with pytest.raises(Unsupported, match=rf"elements: 1 bytes from a file of 100, .*set {VARIABLE}") as seen:
        allowance.spend(1, "repeats its elements", tensor="w")
    assert seen.value.tensor == "w"


def test_large_files_may_grow_to_64_times_their_size() -> None:
    allowance = Allowance(10 * MIB)
    allowance.spend(640 * MIB, "is sparse")
    with pytest.raises(Unsupported, match="is sparse"):
        allowance.spend(1, "is sparse")


def test_what_was_refused_is_not_counted() -> None:
    allowance = Allowance(0)
    with pytest.raises(Unsupported):
        allowance.spend(10**400, "is of a size that no file has")
    allowance.spend(256 * MIB, "is sparse")


@pytest.mark.parametrize(("text", "nbytes"), [("1000", 1000), ("3k", 3 << 10), ("2M", 2 * MIB), ("1G", 1 << 30)])
def test_the_environment_sets_it(text: str, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    Allowance(0).spend(nbytes, "is sparse")
    with pytest.raises(Unsupported):
        Allowance(0).spend(nbytes + 1, "is sparse")


@pytest.mark.parametrize("text", ["much", "-1", "1.5G", "1" * 40])
def test_what_is_no_size_is_said(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UsageError, match=f"{VARIABLE}='{text}' is not a size"):
        Allowance(0)


def test_further_files_allow_more() -> None:
    allowance = Allowance(1)
    allowance.spend(255 * MIB, "is sparse")
    allowance.include(8 * MIB)  # 64 times that, and of a byte
    allowance.spend(257 * MIB, "is sparse")
    with pytest.raises(Unsupported):
        allowance.spend(MIB, "is sparse")


def test_each_use_of_a_model_has_the_same_rest() -> None:
    allowance = Allowance(0)
    allowance.spend(156 * MIB, "is sparse")
    for _ in range(3):
        use = allowance.rest()
        use.spend(100 * MIB, "needs constants")
        with pytest.raises(Unsupported):
            use.spend(1, "needs constants")


def test_what_the_files_hold_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "50")
    allowance = Allowance(100)
    for _ in range(3):
        allowance.hold(50)
    with pytest.raises(Unsupported, match="tensor 'w': repeats or expands what the file holds: 1 bytes"):
        allowance.hold(1, tensor="w")


def test_parameters_count_as_often_as_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    scale = Tensor.from_array("scale", np.ones((1, 1), np.float32))
    codes = np.zeros((4, 4), np.int8)
    tensors = {name: Tensor.from_array(name, codes, Quantization(scale, (4, 4))) for name in "ab"}
    Allowance(2 * (16 + 4)).hold_all(tensors)
    with pytest.raises(Unsupported, match="tensor 'b'"):
        Allowance(2 * (16 + 4) - 1).hold_all(tensors)


def test_a_product_of_damaged_sizes_adds_nothing() -> None:
    allowance = Allowance(0)
    allowance.spend(-(1 << 40), "is of a negative size")
    with pytest.raises(Unsupported):
        allowance.spend(257 * MIB, "is sparse")
