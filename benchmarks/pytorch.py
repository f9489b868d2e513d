"""Reading PyTorch files, whole processes, against torch.load with weights_only and mmap: no faster way is offered."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import Row, processes_by_turns

MAKE = """
import sys, torch
scales, zeros = torch.rand(2048, dtype=torch.float64) / 99, torch.zeros(2048, dtype=torch.int64)
state = {}
for number in range(64):
    codes = torch.randint(-8, 8, (2048, 2048), dtype=torch.int8)
    state[f"layers.{number}.weight"] = torch._make_per_channel_quantized_tensor(codes, scales, zeros, 0)
    state[f"layers.{number}.bias"] = torch.randn(2048)
    state[f"layers.{number}.norm"] = torch.randn(2048, 1024).half()
torch.save(state, sys.argv[1])
"""
THEIRS = "import sys, torch; state = torch.load(sys.argv[1], weights_only=True, mmap=True); "
OURS = "import sys, nibblecast; state = nibblecast.load(sys.argv[1]); "
#: What is done with the file, by both.
TASKS = (
    ("list 192 tensors", "print([(n, t.shape, t.dtype) for n, t in state.items()])", "10 times as fast, memory 0.33"),
    ("dequantize one of them", "print(state['layers.40.weight'].dequantize()[7, :3])", ""),
)


def rows(folder: Path) -> list[Row]:
    """A file of 512 MiB."""
    if find_spec("torch") is None:
        return [Row("PyTorch files", "", "pip install torch", "")]
    path = folder / "model.pt"
    subprocess.run([sys.executable, "-c", MAKE, str(path)], check=True)
    found = []
    for what, task, wanted in TASKS:
        commands = [[sys.executable, "-c", start + task, str(path)] for start in (OURS, THEIRS)]
        (seconds, peak), (peer_seconds, peer_peak) = processes_by_turns(commands, rounds=5)
        ours, theirs = f"{seconds:.2f} s, {peak >> 20} MB", f"{peer_seconds:.2f} s, {peer_peak >> 20} MB"
        ratio = f"{peer_seconds / seconds:.1f} times as fast, memory {peak / peer_peak:.2f}"
        found.append(Row(f"512 MiB of .pt: {what}, against torch.load", ours, theirs, ratio, wanted))
    return found
