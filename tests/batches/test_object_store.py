"""Models in an object store: a server of one, on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import nibblecast
from nibblecast import BatchSettings
from nibblecast.converters.batches.records import REPORT, record_of
from nibblecast.converters.errors import UsageError
from tests.batches.places import GOOD, NO_MODELS, objects_of, outputs_of, write_models
from tests.waiting import until

pytestmark = [pytest.mark.peers, pytest.mark.slow]
BUCKET = "s3://models"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return write_models(tmp_path / "models")


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """The environment in which s3:// is a server of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        answers(url)
        yield {
            **os.environ,
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        process.kill()


def answers(url: str) -> None:
    def answered() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/moto-api/"):
                return True
        except OSError:
            return False

    until(answered)


@pytest.fixture
def bucket(server: dict[str, str], models: Path, monkeypatch: pytest.MonkeyPatch):
    """The store, with the models in a bucket of it and nothing else."""
    import s3fs

    for key, value in server.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    if store.exists("models"):
        store.rm("models", recursive=True)
    store.mkdir("models")
    for path in models.rglob("*"):
        if path.is_file():
            store.put_file(str(path), f"models/in/{path.relative_to(models)}")
    yield store
    s3fs.S3FileSystem.clear_instance_cache()


def batch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nibblecast", "batch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_from_a_bucket_to_a_bucket(bucket, models: Path, tmp_path: Path) -> None:
    local = nibblecast.batch(models, tmp_path / "out", ["safetensors", "cheader"], exclude=NO_MODELS)
    formats = ["--to", "safetensors", "--to", "cheader"] + [f"--exclude={pattern}" for pattern in NO_MODELS]
    done = batch(f"{BUCKET}/in", f"{BUCKET}/out", *formats, "--jobs", 2)
    assert done.returncode == 7, done.stderr
    assert objects_of(bucket, "models/out") == outputs_of(tmp_path / "out")
    lines = bucket.cat_file(f"models/out/{REPORT}").decode().splitlines(keepends=True)
    records = [record_of(line) for line in lines]
    assert [r.source for r in records] == [r.source for r in local.records]
    assert [r.sha256 for r in records] == [r.sha256 for r in local.records]
    assert [r.outputs for r in records] == [r.outputs for r in local.records]
    (broken,) = (r for r in records if not r.done)
    assert broken.failure.message.startswith(f"{BUCKET}/in/broken.tflite: ")
    assert broken.failure.exit_code == 3


def test_resume_goes_by_what_the_store_says(bucket) -> None:
    source, target = f"{BUCKET}/in", f"{BUCKET}/out"
    exclude = ["broken*", "*.weights.bin"]
    nibblecast.batch(source, target, "safetensors", exclude=exclude)
    whole = objects_of(bucket, "models/out")
    changed, gone = GOOD[0].name, f"part/{GOOD[1].name}"
    bucket.pipe_file(f"models/in/{changed}", GOOD[0].read_bytes())
    bucket.rm_file(f"models/out/{Path(gone).with_suffix('.safetensors')}")
    result = nibblecast.batch(
        source, target, "safetensors", exclude=["broken*", "*.weights.bin"], settings=BatchSettings(resume=True)
    )
    assert not result.failed
    assert {record.source for record in result.records if not record.kept} - {changed} == {gone}
    bucket.put_file(str(GOOD[1]), f"models/in/{changed}")
    result = nibblecast.batch(
        source, target, "safetensors", exclude=["broken*", "*.weights.bin"], settings=BatchSettings(resume=True)
    )
    assert [record.source for record in result.records if not record.kept] == [changed]
    assert objects_of(bucket, "models/out").keys() == whole.keys()


def test_from_here_to_a_bucket_and_back(bucket, models: Path, tmp_path: Path) -> None:
    nibblecast.batch(models, f"{BUCKET}/out", "safetensors", exclude=["broken*", "*.weights.bin"])
    result = nibblecast.batch(f"{BUCKET}/out", tmp_path / "back", "safetensors")
    assert not result.failed
    assert outputs_of(tmp_path / "back") == objects_of(bucket, "models/out")


def test_a_list_of_urls(bucket, tmp_path: Path) -> None:
    names = [GOOD[0].name, "part/llama"]
    (tmp_path / "list.txt").write_text("".join(f"{BUCKET}/in/{name}\n" for name in names))
    result = nibblecast.batch(tmp_path / "list.txt", tmp_path / "out", "safetensors")
    assert [record.source for record in result.records] == names
    assert all(record.done for record in result.records)
    (tmp_path / "list.txt").write_text(f"{BUCKET}/in/none.tflite\n")
    with pytest.raises(UsageError, match="s3://models/in/none.tflite: is in the list .*, but does not exist"):
        nibblecast.batch(tmp_path / "list.txt", tmp_path / "out", "safetensors")


def test_a_folder_is_replaced_whole(bucket, tmp_path: Path) -> None:
    options = {"include": ["part/llama"], "shard_size": 300}
    nibblecast.batch(f"{BUCKET}/in", f"{BUCKET}/out", "safetensors", **options)
    many = objects_of(bucket, "models/out/part/llama")
    nibblecast.batch(f"{BUCKET}/in", f"{BUCKET}/out", "safetensors", include=["part/llama"])
    nibblecast.batch(f"{BUCKET}/in", tmp_path / "out", "safetensors", include=["part/llama"])
    few = objects_of(bucket, "models/out/part/llama")
    assert few == outputs_of(tmp_path / "out" / "part" / "llama")
    assert len(few) < len(many)


#: Runs at the start of every process: the store refuses what a model's second upload, or a second part of one, is.
REFUSING = """
import s3fs

call = s3fs.S3FileSystem._call_s3
calls = []

async def refusing(self, method, *arguments, **options):
    if method == METHOD and "refused" in options["Key"]:
        calls.append(method)
        if len(calls) > 1:
            raise PermissionError("Access Denied")
    return await call(self, method, *arguments, **options)

s3fs.S3FileSystem._call_s3 = refusing
"""


@pytest.mark.parametrize("method", ["put_object", "upload_part"])
def test_a_failed_upload_leaves_no_object(method: str, bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(f"METHOD = {method!r}\n{REFUSING}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))
    name = "refused.safetensors"
    weights = np.zeros((101 << 20,) if method == "upload_part" else (8,), np.uint8)
    save_file({"weights": weights}, tmp_path / name)
    bucket.put_file(str(tmp_path / name), f"models/in/{name}")
    formats = ["--to", "safetensors"] if method == "upload_part" else ["--to", "safetensors", "--to", "cheader"]
    done = batch(f"{BUCKET}/in", f"{BUCKET}/out", *formats, "--include", name, "--include", GOOD[2].name, "--json")
    failed, good = sorted(json.loads(done.stdout)["records"], key=lambda record: record["status"] == "done")
    assert failed["failure"]["exit_code"] == 2
    assert "cannot be reached: Access Denied" in failed["failure"]["message"]
    assert failed["outputs"] == []
    assert good["status"] == "done"
    assert set(objects_of(bucket, "models/out")) == {output["path"] for output in good["outputs"]}
    assert bucket.list_multipart_uploads("models") == []


def test_a_bucket_that_is_not_there_is_one_line(bucket, models: Path) -> None:
    done = batch(models, "s3://nowhere/out", "--to", "safetensors")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "cannot be reached: The specified bucket does not exist" in line
