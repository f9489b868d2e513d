"""A batch on a Dask cluster: a real scheduler and workers, each a process of its own, one of which is killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nibblecast.converters.batches.records import REPORT, read_report
from tests.waiting import until

pytestmark = [pytest.mark.peers, pytest.mark.slow]
FIXTURES = Path(__file__).parents[2] / "fixtures" / "tflite"
MODELS = [path for path in sorted(FIXTURES.glob("*.tflite")) if not path.name.startswith("external_")][:12]

#: Runs at the start of every process of the cluster: a conversion takes its time, and leaves a mark that it was begun.
SLOW = """
import os, signal, time
from pathlib import Path
from nibblecast.converters.batches import run_job

convert = run_job._converted

def converted(job, *, dry_run):
    Path(os.environ["BEGUN"], f"{Path(job.name).stem}-{os.getpid()}").touch()
    time.sleep(600 if "hangs" in job.name else 0.1)
    if "dies" in job.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return convert(job, dry_run=dry_run)

run_job._converted = converted
"""


class Cluster:
    """A scheduler and two workers; the first is one process, the second is kept up by another (a nanny)."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SLOW)
        self.begun = folder / "begun"
        self.begun.mkdir()
        path = os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")]), *sys.path])
        self.environment = {**os.environ, "PYTHONPATH": path, "BEGUN": str(self.begun)}
        self.log = stack.enter_context((folder / "log").open("w"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        self.scheduler = self.started(stack, "scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
        common = ["worker", f"tcp://{self.address}", "--nthreads", "1", "--no-dashboard", "--local-directory"]
        self.workers = [
            self.started(stack, *common, str(folder / "first"), "--no-nanny"),
            self.started(stack, *common, str(folder / "second")),
        ]

    def started(self, stack: ExitStack, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *arguments]
        process = subprocess.Popen(
            command, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        stack.callback(ended, process)
        return process


def ended(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


@contextmanager
def cluster_in(folder: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        cluster = Cluster(folder, stack)
        script = (
            "import sys\nfrom distributed import Client\n"
            "with Client(sys.argv[1], timeout=30) as client:\n    client.wait_for_workers(2, timeout=30)"
        )
        subprocess.run([sys.executable, "-c", script, f"tcp://{cluster.address}"], check=True, capture_output=True)
        yield cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_in(tmp_path) as running:
        yield running


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for path in MODELS:
        shutil.copy(path, folder)
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "nibblecast", "batch", *map(str, arguments), "--to", "safetensors"]


def outputs_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_killed_worker_costs_a_repeated_job(cluster: Cluster, models: Path, tmp_path: Path) -> None:
    subprocess.run(command(models, tmp_path / "local"), check=True, capture_output=True)
    out = tmp_path / "out"
    arguments = command(models, out, "--executor", f"dask://{cluster.address}")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as batch:
        until(lambda: len(list(cluster.begun.iterdir())) >= 3)
        cluster.workers[0].kill()
        _, errors = batch.communicate(timeout=300)
    assert batch.returncode == 0, errors
    assert len(list(cluster.begun.iterdir())) > len(MODELS)
    lines = (out / REPORT).read_text().splitlines()
    assert sorted(read_report(out / REPORT)) == sorted(path.name for path in MODELS)
    assert len(lines) == len(MODELS)
    assert outputs_of(out) == {**outputs_of(tmp_path / "local")}
    assert not list(out.glob("*nibblecast-part"))


def test_limits_hold_there_too(cluster: Cluster, models: Path, tmp_path: Path) -> None:
    for name in ("hangs", "dies"):
        shutil.copy(MODELS[0], models / f"{name}.tflite")
    arguments = command(models, tmp_path / "out", "--executor", f"dask://{cluster.address}", "--timeout", 4)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    failures = {name: r.failure for name, r in read_report(tmp_path / "out" / REPORT).items() if r.failure}
    assert {name: failure.exit_code for name, failure in failures.items()} == {"hangs.tflite": 3, "dies.tflite": 1}
    assert "took longer than 4 s" in failures["hangs.tflite"].message
    assert "its process was ended by SIGKILL" in failures["dies.tflite"].message


def test_an_interruption_ends_what_runs_on_the_cluster(cluster: Cluster, models: Path, tmp_path: Path) -> None:
    for path in models.iterdir():
        path.rename(path.with_stem(f"hangs_{path.stem}"))
    arguments = command(models, tmp_path / "out", "--executor", f"dask://{cluster.address}")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as batch:
        until(lambda: len(list(cluster.begun.iterdir())) == 2)
        children = [int(mark.name.rpartition("-")[2]) for mark in cluster.begun.iterdir()]
        assert all(Path(f"/proc/{child}").exists() for child in children)
        batch.send_signal(signal.SIGINT)
        _, errors = batch.communicate(timeout=300)
    assert batch.returncode == 128 + signal.SIGINT
    assert "Traceback" not in errors
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def test_what_a_killed_batch_has_left_ends_with_the_next(cluster: Cluster, models: Path, tmp_path: Path) -> None:
    arguments = command(models, tmp_path / "out", "--executor", f"dask://{cluster.address}")
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as batch:
        until(lambda: len(list(cluster.begun.iterdir())) >= 2)
        batch.kill()
    children = {int(mark.name.rpartition("-")[2]) for mark in cluster.begun.iterdir()}
    assert len(children) == 2
    subprocess.run([*arguments, "--resume"], check=True, capture_output=True)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert len(outputs_of(tmp_path / "out")) == len(MODELS)


def test_a_scheduler_that_is_lost_ends_the_batch(cluster: Cluster, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(models, out, "--executor", f"dask://{cluster.address}")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as batch:
        until(lambda: len(read_report(out / REPORT)) > 0)
        cluster.scheduler.kill()
        _, errors = batch.communicate(timeout=300)
    assert batch.returncode in (2, 7)
    assert "Traceback" not in errors
    resumed = subprocess.run(command(models, out, "--resume"), capture_output=True, text=True, check=False)
    assert "12 of 12 models converted" in resumed.stdout


def test_a_cluster_of_its_own(models: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(models, tmp_path / "out", "--executor", "dask", "--jobs", 2),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(outputs_of(tmp_path / "out")) == len(MODELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dask://127.0.0.1:1"], "no Dask scheduler answers there"),
        (["dask://there"], "must be dask or dask://HOST:PORT"),
        (["ray"], "must be dask or dask://HOST:PORT"),
        (["dask://127.0.0.1:1", "--jobs", "2"], "doesn't apply to a cluster"),
    ],
)
def test_executors_that_are_none(options: list[str], message: str, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run(command(models, out), check=True, capture_output=True)
    report = (out / REPORT).read_bytes()
    done = subprocess.run(command(models, out, "--executor", *options), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert (out / REPORT).read_bytes() == report
