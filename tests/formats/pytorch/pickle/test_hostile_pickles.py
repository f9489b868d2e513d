"""Nothing that a pickle names is imported or executed, whichever way it asks for it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblecast
from nibblecast.converters.errors import CorruptFile, Error
from tests.formats.pytorch.pickle.hostile_pickles import PROOF, legacy, pickles, zipped

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]
FIXTURES = ROOT / "fixtures" / "pytorch"

#: Reads every hostile file in this process, and reports what happened besides: events that Python's audit hooks see.
WATCHED = """
    import sys
    from pathlib import Path
    import nibblecast
    from tests.formats.pytorch.pickle.hostile_pickles import legacy, pickles, zipped

    HARMLESS = ("builtins.id", "mmap.__new__", "object.__getattr__", "object.__setattr__", "sys._getframe")
    path = Path(sys.argv[1])
    events = []
    watching = False

    def hook(event, arguments):
        if watching and event not in HARMLESS:
            events.append((event, str(arguments)[:100]))

    sys.addaudithook(hook)

    def read():
        global watching
        watching = True
        try:
            list(nibblecast.load(path))
            return "inert"
        except nibblecast.Error:
            return "refused"
        finally:
            watching = False

    outcomes = {"inert": 0, "refused": 0}
    for number, (name, pickled) in enumerate(pickles()):
        if number % 7 == 3:
            path.write_bytes(legacy(pickled))
        else:
            zipped(pickled, path)
        outcomes[read()] += 1
        if number == 20:  # by now everything of ours is imported
            events.clear()
    # the file itself, by its name and by its handle
    opened = {event for event in events if event[0] == "open" and (str(path) in event[1] or event[1][1].isdigit())}
    print(outcomes, sorted(set(events) - opened)[:20])
"""


def test_nothing_is_executed_or_imported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCHED), str(tmp_path / "hostile.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes, _, events = done.stdout.strip().partition("} ")
    assert events == "[]", events
    assert sum(int(part.split(": ")[1]) for part in outcomes.strip("{").split(", ")) == sum(1 for _ in pickles()) > 1000
    assert not (tmp_path / PROOF).exists()


@pytest.mark.parametrize("module", ["os", "posix", "subprocess", "builtins", "torch.serialization"])
def test_the_refusal_names_what_would_have_been_called(module: str, tmp_path: Path) -> None:
    name = {"subprocess": "Popen", "builtins": "eval", "torch.serialization": "os.system"}.get(module, "system")
    zipped(b"c" + f"{module}\n{name}\n".encode() + b"(VX\ntR.", tmp_path / "evil.pt")
    with pytest.raises(CorruptFile, match=rf"would call {module}\.{name}"):
        nibblecast.load(tmp_path / "evil.pt")


def test_a_whole_module_of_a_users_class_is_inert(tmp_path: Path) -> None:
    zipped(b"c__main__\nNet\n)\x81}Va\nNsb.", tmp_path / "net.pt")
    assert list(nibblecast.load(tmp_path / "net.pt")) == []


def sections(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {entry: archive.read(entry) for entry in archive.namelist()}


@pytest.mark.parametrize("case", ["every_dtype", "qat_module", "static_module", "static_scripted", "checkpoint"])
@given(data=st.data())
@settings(max_examples=60)
def test_damaged_pickles_are_refused_in_one_line(case: str, data: st.DataObject, tmp_path_factory: object) -> None:
    records = sections(FIXTURES / f"{case}.pt")
    name = next(record for record in records if record.endswith("data.pkl"))
    pickled = bytearray(records[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(pickled) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "flip"]))
        byte = data.draw(st.integers(0, 255))
        if kind == "set":
            pickled[at] = byte
        elif kind == "flip":
            pickled[at] ^= 1 << byte % 8
        elif kind == "insert":
            pickled[at:at] = bytes([byte])
        else:
            del pickled[at : at + byte % 9]
        if not pickled:
            return
    path = Path(tmp_path_factory.getbasetemp()) / "damaged.pt"  # type: ignore[attr-defined]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, content in records.items():
            archive.writestr(record, bytes(pickled) if record == name else content)
    read_or_refuse(path)


@given(data=st.data())
@settings(max_examples=100)
def test_damaged_files_are_refused_in_one_line(data: st.DataObject, tmp_path_factory: object) -> None:
    case = data.draw(st.sampled_from(["legacy", "module", "quantized_tensors"]))
    content = bytearray((FIXTURES / f"{case}.pt").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2])) :]
    path = Path(tmp_path_factory.getbasetemp()) / "damaged.pt"  # type: ignore[attr-defined]
    path.write_bytes(content)
    read_or_refuse(path)


def read_or_refuse(path: Path) -> None:
    try:
        model = nibblecast.load(path)
        for tensor in model.values():
            if tensor.dtype.kind != "c":
                tensor.dequantize()
    except Error as error:
        assert "\n" not in str(error)


def test_legacy_files_hold_their_value_after_three_pickles(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(legacy(b"\x80\x02}."))
    assert list(nibblecast.load(path)) == []
