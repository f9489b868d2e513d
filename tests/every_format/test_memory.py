"""How much memory a conversion takes: as much for a large model as for a small one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.formats.gguf import gguf_files

pytestmark = pytest.mark.slow

_OUTPUTS, _INPUTS = 1024, 4096
_SMALL, _LARGE = 8, 48  # matrices: 2 MiB of codes each
_STATE = {
    "quant_type": "nf4",
    "blocksize": 64,
    "dtype": "float16",
    "shape": [_OUTPUTS, _INPUTS],
    "nested_blocksize": 256,
    "nested_offset": 0.0,
}
#: A process of its own, and what it had of memory at most; `ru_maxrss` would begin with what its parent has.
_PROGRAM = """
import re, sys
from pathlib import Path
import nibblecast
source, target, dequantize, quantize = sys.argv[1:]
nibblecast.convert(source, target, dequantize=dequantize or None, quantize=quantize or None)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10)
"""


def gptq(path: Path, count: int) -> Path:
    groups = _INPUTS // 128
    parts = {
        "qweight": ("I32", (_INPUTS // 8, _OUTPUTS), b""),
        "qzeros": ("I32", (groups, _OUTPUTS // 8), b""),
        "scales": ("F16", (groups, _OUTPUTS), b""),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"}
    (path.parent / "config.json").write_text(json.dumps({"quantization_config": config}))
    return _safetensors(path, {f"{n}.{part}": value for n in range(count) for part, value in parts.items()})


def nf4(path: Path, count: int) -> Path:
    state = json.dumps(_STATE).encode()
    blocks = _OUTPUTS * _INPUTS // 64
    parts = {
        "": ("U8", (_OUTPUTS * _INPUTS // 2, 1), b""),
        ".absmax": ("U8", (blocks,), b""),
        ".nested_absmax": ("F32", (blocks // 256,), b""),
        ".quant_map": ("F32", (16,), b""),
        ".nested_quant_map": ("F32", (256,), b""),
        ".quant_state.bitsandbytes__nf4": ("U8", (len(state),), state),
    }
    return _safetensors(path, {f"{n}.weight{part}": value for n in range(count) for part, value in parts.items()})


def q4_k(path: Path, count: int) -> Path:
    nbytes = _OUTPUTS * _INPUTS // 256 * 144
    infos = [gguf_files.info(f"{n}.weight", (_OUTPUTS, _INPUTS), 12, n * nbytes) for n in range(count)]
    with path.open("wb") as file:
        file.write(gguf_files.file(infos))
        file.truncate(file.tell() + count * nbytes)
    return path


def floats(path: Path, count: int) -> Path:
    return _safetensors(path, {f"{n}.weight": ("F32", (_OUTPUTS, _INPUTS), b"") for n in range(count)})


def _safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> Path:
    """A file with those dtypes, shapes and contents; zeros, as holes that take no disk, where there is no content."""
    sizes = {"U8": 1, "F16": 2, "I32": 4, "F32": 4}
    header, contents, end = {}, [], 0
    for key, (kind, shape, content) in tensors.items():
        nbytes = sizes[kind]
        for size in shape:
            nbytes *= size
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        contents.append((end, content))
        end += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for offset, content in contents:
            file.seek(start + offset)
            file.write(content)
        file.truncate(start + end)
    return path


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(gptq, ""), (gptq, "bfloat16"), (nf4, "float16"), (q4_k, "float32")],
    ids=["GPTQ, packed", "GPTQ to bfloat16", "NF4 to float16", "Q4_K to float32"],
)
def test_memory_does_not_grow_with_the_checkpoint(
    make: Callable[[Path, int], Path], dtype: str, tmp_path: Path
) -> None:
    peaks = []
    for count in (_SMALL, _LARGE):
        source = make(tmp_path / f"model.{'gguf' if make is q4_k else 'safetensors'}", count)
        peaks.append(_peak(source, dequantize=dtype))
    codes = (_LARGE - _SMALL) * _OUTPUTS * _INPUTS // 2
    assert peaks[1] - peaks[0] < codes // 3, peaks  # some megabytes come and go with threads


def test_memory_does_not_grow_with_floats_that_are_quantized(tmp_path: Path) -> None:
    """The file has all scales before all codes; both counts are past what is kept from one to the other, 64 MiB."""
    peaks = [_peak(floats(tmp_path / "model.safetensors", count), quantize="int4,block=8") for count in (20, 48)]
    fitted = (48 - 20) * _OUTPUTS * _INPUTS // 8 * 8
    assert peaks[1] - peaks[0] < fitted // 3, peaks


def _peak(source: Path, *, dequantize: str = "", quantize: str = "") -> int:
    """The most bytes of memory that a conversion to one file takes."""
    target = source.parent / "out" / "w.safetensors"
    target.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "NIBBLECAST_COMPILE_AFTER": "never"}  # the compiler itself takes 100 MB
    command = [sys.executable, "-c", _PROGRAM, str(source), str(target), dequantize, quantize]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)
