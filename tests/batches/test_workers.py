"""What becomes of a model whose worker hangs, dies, or takes too much memory: its own result, and the others go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path

import pytest

from nibblecast.converters.batches.child import Children
from nibblecast.converters.batches.job import Request
from nibblecast.converters.batches.outputs import planned_jobs
from nibblecast.converters.batches.records import REPORT, read_report
from nibblecast.converters.batches.sources import find_sources
from tests.waiting import until

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tflite"
GOOD = FIXTURES / "cnn_int4_per_channel.tflite"

#: Runs at the start of every worker: the names of models say how it misbehaves. The batch itself imports nothing so
#: early: an interruption would come while Python starts, before anything of ours can see to it.
MISBEHAVING = """
import sys

def misbehave():
    import os, signal, time
    from pathlib import Path
    import numpy as np
    from nibblecast.converters.batches import run_job
    from nibblecast.converters.output.private_folder import hidden_name, make_temporary

    convert = run_job._converted

    def converted(job, *, dry_run):
        stem = Path(job.name).stem
        if stem in ("hangs", "dies", "exits"):
            part = make_temporary(job.folder, hidden_name(job.targets[0][1].name), ".nibblecast-part")
            (part.path / "half").write_bytes(b"half")
        if stem == "hangs":
            time.sleep(600)
        if stem == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if stem == "exits":
            os._exit(5)
        if stem == "eats":
            np.ones(1 << 31, np.uint8)
        if stem == "fails once":
            marker = job.folder / ".failed"
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSEGV)
        if stem == "bug":
            raise RuntimeError("a bug\\nin two lines")
        return convert(job, dry_run=dry_run)

    run_job._converted = converted

if "nibblecast.converters.batches.child" in sys.orig_argv:
    misbehave()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(MISBEHAVING)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def models(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in (*names, *(f"good{number}" for number in range(6))):
        shutil.copy(GOOD, folder / f"{name}.tflite")
    return folder


def command(folder: Path, *options: str) -> list[str]:
    """Converts a folder to `out` beside it."""
    target = folder.parent / "out"
    return [sys.executable, "-m", "nibblecast", "batch", str(folder), str(target), "--to", "safetensors", *options]


def batch(folder: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    arguments = command(folder, "--jobs", "2", *options)
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "exit_code", "message"),
    [
        ("hangs", 3, "took longer than 3 s"),
        ("dies", 1, "its process was ended by SIGKILL"),
        ("exits", 1, "its process ended with exit code 5"),
        ("eats", 3, "takes more memory than is allowed"),
        ("bug", 1, r"a bug of nibblecast: RuntimeError: a bug\nin two lines"),
    ],
)
def test_it_is_that_models_result(
    name: str, exit_code: int, message: str, environment: dict[str, str], tmp_path: Path
) -> None:
    limit = ["--timeout", "3"] if name == "hangs" else []  # others may wait for a processor
    done = batch(models(tmp_path / "models", name), environment, *limit, "--memory", "1G")
    assert done.returncode == 7, done.stderr
    records = read_report(tmp_path / "out" / REPORT)
    assert sum(record.done for record in records.values()) == 6
    failure = records[f"{name}.tflite"].failure
    assert failure is not None
    assert failure.exit_code == exit_code
    assert message in failure.message
    assert "\n" not in failure.message
    assert not list((tmp_path / "out").glob(".*part"))


@pytest.mark.parametrize(("retries", "done"), [(0, False), (1, True)])
def test_what_may_pass_is_tried_again(retries: int, done: bool, environment: dict[str, str], tmp_path: Path) -> None:
    batch(models(tmp_path / "models", "fails once"), environment, "--retries", str(retries))
    record = read_report(tmp_path / "out" / REPORT)["fails once.tflite"]
    assert record.done == done
    assert record.attempts == 1 + retries


def test_what_is_wrong_with_the_model_is_not_tried_again(environment: dict[str, str], tmp_path: Path) -> None:
    folder = models(tmp_path / "models")
    (folder / "broken.tflite").write_bytes(GOOD.read_bytes()[:500])
    batch(folder, environment, "--retries", "5")
    assert read_report(tmp_path / "out" / REPORT)["broken.tflite"].attempts == 1


def test_small_models_are_handed_out_together_and_fail_alone(environment: dict[str, str], tmp_path: Path) -> None:
    folder = models(tmp_path / "models", "dies", "exits", "hangs", *(f"more{number:02}" for number in range(60)))
    batch(folder, environment, "--timeout", "5")
    records = read_report(tmp_path / "out" / REPORT)
    assert len(records) == 69
    failed = {name.removesuffix(".tflite") for name, record in records.items() if not record.done}
    assert failed == {"dies", "exits", "hangs"}


def test_a_child_whose_records_nobody_takes_ends(tmp_path: Path) -> None:
    folder = models(tmp_path / "models")
    (tmp_path / "out").mkdir()
    sources = find_sources(folder, (), (), str(tmp_path / "out"))
    jobs = planned_jobs(sources, tmp_path / "out", ["safetensors"], Request())
    children = Children(None, None, 1)
    with closing(children.run(jobs)) as records:
        assert next(records).source == jobs[0].name
    assert [record.source for record in children.run(jobs)] == [job.name for job in jobs]  # of another child
    children.end()
    with pytest.raises(CancelledError):
        next(children.run(jobs))


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_from_a_terminal_is_for_the_batch_alone(
    ended_by: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    """As ctrl-C does it: all of the process group gets the signal, and workers that have only begun as well."""
    folder = models(tmp_path / "models", "hangs")
    for begun in (".nibblecast-lock", "nibblecast-report.jsonl", ".hangs.safetensors.*.nibblecast-part"):
        with subprocess.Popen(
            command(folder), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            until(
                lambda begun=begun, process=process: list((tmp_path / "out").glob(begun)) or process.poll() is not None
            )
            assert process.poll() is None
            os.killpg(process.pid, ended_by)
            _, errors = process.communicate(timeout=300)
        assert process.returncode == 128 + ended_by, errors
        assert "Traceback" not in errors, errors
        assert not list((tmp_path / "out").glob(".*part"))
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_a_state_to_resume(
    ended_by: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = models(tmp_path / "models", "hangs")
    with subprocess.Popen(command(folder), env=environment, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: len(read_report(tmp_path / "out" / REPORT)) == 6)
        process.send_signal(ended_by)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + ended_by
    assert "Traceback" not in errors, errors
    assert not list((tmp_path / "out").glob(".*part"))
    assert len(read_report(tmp_path / "out" / REPORT)) == 6
    (folder / "hangs.tflite").rename(folder / "works.tflite")
    done = batch(folder, environment, "--resume")
    assert "7 of 7 models converted (6 of them in an earlier run)" in done.stdout


def test_workers_end_with_the_process_that_started_them(environment: dict[str, str], tmp_path: Path) -> None:
    folder = models(tmp_path / "models", "hangs")
    with subprocess.Popen(
        command(folder), env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        until(lambda: len(read_report(tmp_path / "out" / REPORT)) == 6)
        process.kill()
    until(lambda: _session(process.pid) == [])


def _session(leader: int) -> list[int]:
    """The processes of a session that are running."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(folder.name))
    return found
