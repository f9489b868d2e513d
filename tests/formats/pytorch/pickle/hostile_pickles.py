"""Pickles that would run something, from every opcode that can call and in every container; made byte by byte."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

PROOF = "executed"

#: What an attacker calls, as (module, name, arguments): Python's own library under all its names, dotted names, what
#: third parties offer, and callables that call others.
CALLABLES: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("os", "system", (f"touch {PROOF}",)),
    ("posix", "system", (f"touch {PROOF}",)),
    ("nt", "system", (f"touch {PROOF}",)),
    ("subprocess", "Popen", ((("touch", PROOF)),)),
    ("subprocess", "check_output", ((("touch", PROOF)),)),
    ("builtins", "eval", (f"open('{PROOF}', 'w')",)),
    ("__builtin__", "eval", (f"open('{PROOF}', 'w')",)),
    ("builtins", "exec", (f"open('{PROOF}', 'w')",)),
    ("builtins", "open", (PROOF, "w")),
    ("io", "open", (PROOF, "w")),
    ("_io", "open", (PROOF, "w")),
    ("builtins", "__import__", ("this",)),
    ("builtins", "getattr", ("", "upper")),
    ("builtins", "compile", ("1", "x", "eval")),
    ("builtins", "breakpoint", ()),
    ("builtins", "type", ("x", (), {})),
    ("importlib", "import_module", ("this",)),
    ("runpy", "run_module", ("this",)),
    ("pty", "spawn", ("/bin/true",)),
    ("timeit", "timeit", (f"open('{PROOF}', 'w')",)),
    ("code", "interact", ()),
    ("pickle", "loads", (b"cos\nsystem\n(S'true'\ntR.",)),
    ("_pickle", "loads", (b"cos\nsystem\n(S'true'\ntR.",)),
    ("marshal", "loads", (b"N",)),
    ("shutil", "rmtree", (PROOF,)),
    ("pathlib", "Path.touch", (PROOF,)),
    ("operator", "attrgetter", ("system",)),
    ("operator", "methodcaller", ("system", "true")),
    ("functools", "reduce", (1, 2)),
    ("ctypes", "CDLL", ("libc.so.6",)),
    ("socket", "create_connection", (("localhost", 1),)),
    ("webbrowser", "open", ("file:///",)),
    ("platform", "popen", ("true",)),
    ("asyncio", "run", (1,)),
    ("collections", "OrderedDict.fromkeys", ([1],)),
    ("torch.serialization", "os.system", (f"touch {PROOF}",)),
    ("torch.storage", "io.open", (PROOF, "w")),
    ("torch.utils.data", "os.path.exists", (PROOF,)),
    ("torch.hub", "load", ("x", "y")),
    ("torch", "load", (PROOF,)),
    ("torch._inductor.codecache", "compile_file", (PROOF, PROOF, "x")),
    ("torch.jit.unsupported_tensor_ops", "execWrapper", ("1", {}, {})),
    ("numpy.testing._private.utils", "runstring", (f"open('{PROOF}', 'w')", {})),
    ("pip", "main", (["list"],)),
    ("site.os", "system", (f"touch {PROOF}",)),
    ("__main__", "os.system", (f"touch {PROOF}",)),
    ("mine.__globals__", "x", ()),
    ("mine", "f.__globals__", ()),
)


def _text(text: str, protocol: int) -> bytes:
    encoded = text.encode()
    if protocol >= 4:
        return b"\x8c" + bytes([len(encoded)]) + encoded
    if protocol >= 1:
        return b"X" + struct.pack("<I", len(encoded)) + encoded
    return b"V" + encoded + b"\n"


def _arguments(arguments: object, protocol: int) -> bytes:
    """The opcodes that push them, without protocol, frame and stop."""
    pushed = pickle.dumps(arguments, min(protocol, 2))
    return pushed[2:-1] if protocol >= 2 else pushed[:-1]


def calls(module: str, name: str, arguments: tuple[object, ...], protocol: int) -> Iterator[tuple[str, bytes]]:
    """The opcodes of every way to call it with that protocol, by the way's name."""
    pushed = _arguments(arguments, protocol)
    named = f"{module}\n{name}\n".encode()
    line = b"c" + named
    yield "REDUCE", line + pushed + b"R"
    yield "memoised REDUCE", line + b"p7\n0" + b"g7\n" + pushed + b"R"
    yield "NEWOBJ", line + pushed + b"\x81"
    yield "NEWOBJ_EX", line + pushed + b"}\x92"
    yield "INST", b"(" + b"".join(_arguments(a, protocol) for a in arguments) + b"i" + named
    yield "OBJ", b"(" + line + b"".join(_arguments(a, protocol) for a in arguments) + b"o"
    yield "BUILD", line + pushed + b"R" + b"}" + _text("x", protocol) + b"Nsb"
    yield "BUILD setstate", b"c__main__\nMine\n)\x81}" + _text("__setstate__", protocol) + line + b"sb" + pushed + b"b"
    yield "as a key", b"}" + line + pushed + b"R" + b"Ns"
    yield "as an item", b"]" + line + pushed + b"R" + b"a"
    yield "partial", b"cfunctools\npartial\n(" + line + b"tR" + pushed + b"R"
    yield "copyreg", b"ccopyreg\n__newobj__\n(" + line + b"tR"
    yield "reconstructor", b"ccopy_reg\n_reconstructor\n(" + line + b"c__builtin__\nobject\nNtR"
    yield "from_type", b"ctorch._tensor\n_rebuild_from_type_v2\n(" + line + line + pushed + b"NtR"
    yield "persistent id", line + pushed + b"R" + b"Q"
    yield "torch storage", b"(" + _text("storage", protocol) + line + b"Vx\nVcpu\nI1\ntQ"
    if protocol >= 4:
        stacked = _text(module, 4) + _text(name, 4) + b"\x93"
        yield "STACK_GLOBAL", stacked + pushed + b"R"
        yield "memoised STACK_GLOBAL", stacked + b"\x94" + b"0h\x00" + pushed + b"R"
    yield "EXT1", b"\x82\x01" + pushed + b"R"


def pickles() -> Iterator[tuple[str, bytes]]:
    """All of them, each with a name."""
    for module, name, arguments in CALLABLES:
        for protocol in range(6):
            head = b"\x80" + bytes([protocol]) if protocol >= 2 else b""
            for way, opcodes in calls(module, name, arguments, protocol):
                yield f"{module} {name} by {way} in protocol {protocol}", head + opcodes + b"."


def zipped(pickled: bytes, path: Path) -> None:
    """A PyTorch archive of this pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


def legacy(pickled: bytes) -> bytes:
    """A file of the old container with this pickle as its value."""
    file = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, file, 2)
    return file.getvalue() + pickled + pickle.dumps([], 2)
