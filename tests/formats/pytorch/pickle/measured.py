"""Reads files in processes of their own, with limits, and tells what came of it and what it took.

    python -m tests.formats.pytorch.pickle.measured MODULE FUNCTION FOLDER      (a function of a module beside this one)

prints a line of JSON for each file: its name, what came of it ("read", "refused", or what ended it), processor time in
seconds, the most memory in bytes. The first line is about an honest file of a megabyte.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import nibblecast
from nibblecast.converters.conversion import convert_model
from nibblecast.converters.errors import Error
from tests.formats.pytorch.pickle.bombs import honest

CPU_SECONDS = 120
MEMORY = 600 << 20
STACK = 1 << 20
_DECODED_BYTES = 16 << 20


def examine(path: Path) -> str:
    """Reads a file, decodes its tensors and plans to write it."""
    try:
        model = nibblecast.load(path)
        left = _DECODED_BYTES
        for tensor in model.values():
            left -= tensor.size * 4
            if left > 0 and tensor.dtype.kind != "c":
                tensor.dequantize()
        convert_model(model, [path.with_suffix(".safetensors")], dry_run=True, options={})
    except Error as error:
        said = str(error).removeprefix(f"{path}: ")
        return f"refused: {said}" if "\n" not in said and len(said) < 2000 else f"a long line: {said[:2000]}"
    except BaseException:
        return traceback.format_exc()
    return "read"


def measured(files: Iterable[tuple[str, bytes]], path: Path) -> list[dict[str, Any]]:
    """What came of these files, all of them in one new process; the last one is that which ended it."""
    report, reported = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK))
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
        for name, content in files:
            path.write_bytes(content)
            os.write(reported, f"{json.dumps({'name': name})}\n".encode())
            before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            came = examine(path)
            after = resource.getrusage(resource.RUSAGE_SELF)
            found = {"came": came, "cpu": after.ru_utime - before, "memory": after.ru_maxrss << 10}
            os.write(reported, f"{json.dumps(found)}\n".encode())
        os._exit(0)
    os.close(reported)
    with open(report) as stream:  # noqa: PTH123
        lines = [json.loads(line) for line in stream]
    _, status, usage = os.wait4(child, 0)
    results: list[dict[str, Any]] = []
    for line in lines:
        if "name" in line:
            results.append(
                line | {"came": f"ended by {status}", "cpu": usage.ru_utime, "memory": usage.ru_maxrss << 10}
            )
        else:
            results[-1] |= line
    return results


def main() -> None:
    """Measures what a function of a module makes: the files whose names begin alike in one process."""
    module, function, folder = sys.argv[1:]
    path = Path(folder) / "model.pt"
    path.write_bytes(honest())
    examine(path)  # so that all that it imports is there in the processes that follow
    made = getattr(import_module(f"tests.formats.pytorch.pickle.{module}"), function)()
    for _, group in groupby(chain([("honest: a megabyte", honest())], made), lambda file: file[0].partition(": ")[0]):
        for result in measured(group, path):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
