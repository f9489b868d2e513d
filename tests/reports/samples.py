"""Reports for tests: names that try to break out of a page, and a batch with every outcome."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import nibblecast
from nibblecast.converters.batches.records import REPORT, Failure, Output, Record, write_report

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
HOSTILE = [
    "<script>document.title='broken'</script>",
    '"><img src=x onerror="document.title=\'broken\'">',
    "' onfocus='document.title=1' autofocus='",
    "</table></style></script></title><iframe>",
    "evil\u202egpj.exe\u2066",
    "two\nlines\r\0and\ta\x1b[31mcolour",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{$ $x^2$",
    "javascript:document.title='broken'",
    "&amp;&lt;&#60;",
    "model.layers.0.\u00e9\u4f60\U0001f600.weight",
    "n" * 5_000,
]


def hostile_model(folder: Path) -> Path:
    """A quantized model with such names."""
    floats, codes = folder / "floats.safetensors", folder / "<b>hostile & 'quoted'.safetensors"
    save_file({n: np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32) for n in HOSTILE}, floats)
    nibblecast.convert(floats, codes, quantize="int4,block=16,asymmetric")
    return codes


def batch(folder: Path) -> Path:
    """The folder of a batch."""
    digest = "0" * 64
    records = [
        Record(f"b{i}.onnx", digest, "", (Output(f"b{i}.h", 1000 * (i + 1), digest),), seconds=0.1 * (i + 1))
        for i in range(8)
    ]
    records += [
        Record(
            f"{i}{name}",
            "",
            "",
            losses=({"tensor": name, "kind": "renamed", "detail": name},),
            failure=Failure(3 + i % 3, f"{name}: is broken"),
            peak_memory=1 << 20,
            attempts=2,
            nibblecast=name,
        )
        for i, name in enumerate(HOSTILE)
    ]
    records.append(Record("verified.gguf", digest, "", verified=True, seconds=4000.0, peak_memory=1 << 30))
    folder.mkdir(exist_ok=True)
    write_report(folder / REPORT, records)
    return folder
