"""What is secret in URLs is in nothing that a batch writes, prints or raises; the models are found by them all the
same."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import traceback
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest

import nibblecast
from nibblecast import BatchSettings
from nibblecast.converters.batches import remote
from nibblecast.converters.batches.job import Request
from nibblecast.converters.batches.records import REPORT, Failure
from nibblecast.converters.errors import UsageError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INT4 = ROOT / "fixtures" / "tflite" / "cnn_int4_per_channel.tflite"
SECRETS = ("HUSHUSER", "HUSHPASS", "HUSHSIG", "HUSHTOKEN", "HUSHFRAG")
SIGNATURE = "?X-Amz-Signature=HUSHSIG&token=HUSHTOKEN"
QUERY = f"{SIGNATURE}#HUSHFRAG"


def assert_hushed(*texts: object) -> None:
    for text in texts:
        assert not [secret for secret in SECRETS if secret in str(text)], str(text)[:2_000]


@pytest.fixture
def store() -> fsspec.AbstractFileSystem:
    store = fsspec.filesystem("memory")
    store.store.clear()
    return store


def everything_in(store: fsspec.AbstractFileSystem, folder: str) -> dict[str, bytes]:
    return {name: store.cat_file(name) for name in store.find(folder)}


def test_a_list_of_signed_urls(
    store: fsspec.AbstractFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`memory://` takes a query for a part of the name, as presigned URLs are keys."""
    store.put_file(str(INT4), f"/in/a/m.tflite{QUERY}")
    store.pipe_file(f"/in/b/broken.tflite{QUERY}", b"\x1c\0\0\0TFL3")
    store.pipe_file(f"/in/c/empty.v1.2.tflite{QUERY}", b"")
    names = ("a/m.tflite", "b/broken.tflite", "c/empty.v1.2.tflite")
    (tmp_path / "list").write_text("".join(f"memory://in/{name}{QUERY}\n" for name in names))
    shown: list[object] = []
    result = nibblecast.batch(
        tmp_path / "list",
        "memory://out",
        "safetensors",
        on_result=lambda record, *_: shown.append(record),
        on_running=shown.append,
    )
    assert [record.source for record in result.records] == list(names)
    assert [record.failure and record.failure.exit_code for record in result.records] == [None, 3, 3]
    written = everything_in(store, "/out")
    assert sorted(written) == ["/out/a/m.safetensors", f"/out/{REPORT}"]
    assert_hushed(*written, *written.values(), *shown, *capsys.readouterr())
    assert "memory://in/b/broken.tflite" in result.failed[0].failure.message  # type: ignore[union-attr]
    again = nibblecast.batch(tmp_path / "list", "memory://out", "safetensors", settings=BatchSettings(resume=True))
    assert [record.kept for record in again.records] == [True, False, False]
    nibblecast.report(_brought(store, tmp_path), tmp_path / "page.html")
    assert_hushed((tmp_path / "page.html").read_text())


def _brought(store: fsspec.AbstractFileSystem, folder: Path) -> Path:
    store.get_file(f"/out/{REPORT}", str(folder / REPORT))
    return folder / REPORT


def test_a_new_signature_is_no_new_model(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    store.put_file(str(INT4), "/in/m.tflite?sig=1")
    store.cp_file("/in/m.tflite?sig=1", "/in/m.tflite?sig=2")
    created = store.info("/in/m.tflite?sig=1")["created"]
    store.store["/in/m.tflite?sig=2"].created = created
    for number, kept in ((1, False), (2, True)):
        (tmp_path / "list").write_text(f"memory://in/m.tflite?sig={number}\n")
        (record,) = nibblecast.batch(
            tmp_path / "list", "memory://out", "safetensors", settings=BatchSettings(resume=True)
        ).records
        assert (record.source, record.kept) == ("m.tflite", kept)


def test_urls_that_differ_by_their_query_only_are_told(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    """They would have one name: that is an error before the start."""
    urls = [f"memory://in/m.tflite?sig={secret}" for secret in SECRETS[:2]]
    for url in urls:
        store.put_file(str(INT4), url.partition(":/")[2])
    (tmp_path / "list").write_text("\n".join(urls))
    with pytest.raises(UsageError, match=r"would be written for m\.tflite and for m\.tflite") as caught:
        nibblecast.batch(tmp_path / "list", tmp_path / "out", "safetensors")
    assert_hushed(caught.value)


def nobody_answers() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://HUSHUSER:HUSHPASS@127.0.0.1:{free.getsockname()[1]}/d/m.tflite{QUERY}"


def test_places_that_cannot_be_reached(tmp_path: Path) -> None:
    """Whether its package is missing (exit 4) or nobody answers (exit 2): one line, and none of it in a traceback."""
    url = nobody_answers()
    (tmp_path / "list").write_text(f"{url}\n")
    for source, target in (
        (url, tmp_path / "out"),
        (tmp_path / "list", tmp_path / "out"),
        (ROOT / "fixtures/onnx", url),
    ):
        command = [sys.executable, "-m", "nibblecast", "batch", str(source), str(target), "--to", "safetensors"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode in (2, 4)
        lines = done.stderr.splitlines()
        assert all("failed: " in line for line in lines[:-1]), "of models, where the target is not reached"
        assert lines[-1].startswith("nibblecast: http://***@127.0.0.1")
        assert_hushed(done.stdout, done.stderr)
        with pytest.raises(nibblecast.Error) as caught:
            nibblecast.batch(source, target, "safetensors")
        assert_hushed(caught.value, "".join(traceback.format_exception(caught.value)).replace(url, ""))


def test_what_a_store_says_is_hushed_in_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores quote the URL that they could not reach, and a traceback shows the cause."""

    def refused(_: str) -> None:
        raise FileNotFoundError(2, f"no answer from https://HUSHUSER:HUSHPASS@host/{QUERY}")

    monkeypatch.setattr("fsspec.core.url_to_fs", refused)
    with pytest.raises(UsageError, match="cannot be reached") as caught:
        remote.files_below("memory://x")
    assert isinstance(caught.value.__cause__, OSError)
    shown = traceback.format_exception(caught.value)
    assert_hushed(caught.value, *(line for line in shown if "raise FileNotFoundError" not in line))


class Signed(SimpleHTTPRequestHandler):
    """Files, for those who have the signature."""

    def translate_path(self, path: str) -> str:
        name, mark, query = path.partition("?")
        models = {"/d/m.tflite": INT4, "/d/broken.tflite": ROOT / "README.md"}
        return str(models.get(name, "/nowhere")) if mark + query == SIGNATURE else "/nowhere"

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.peers  # aiohttp, which comes with s3fs
def test_signed_urls_of_a_server(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Signed) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}/d"
        (tmp_path / "list").write_text(f"{where}/m.tflite{SIGNATURE}\n{where}/broken.tflite{SIGNATURE}\n")
        command = [sys.executable, "-m", "nibblecast", "batch", tmp_path / "list", tmp_path / "out", "--to", "cheader"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT)
        server.shutdown()
    assert done.returncode == 7, done.stderr
    assert f"failed: {where}/broken.tflite: " in done.stderr
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert {"m.c", "m.h", REPORT} <= set(written)
    assert_hushed(done.stdout, done.stderr, *written, *written.values())


@pytest.mark.parametrize("command", ["inspect", "convert", "verify", "report", "report --title"])
def test_a_url_where_a_path_belongs(command: str, tmp_path: Path) -> None:
    url = f"https://HUSHUSER:HUSHPASS@host/m.tflite{QUERY}"
    arguments = {
        "inspect": ["inspect", url],
        "convert": ["convert", str(INT4), f"{url}.h"],
        "verify": ["verify", str(INT4), url],
        "report": ["report", url, "-o", str(tmp_path / "a.html")],
        "report --title": ["report", str(INT4), "-o", str(tmp_path / "a.html"), "--title", url],
    }[command]
    program = [sys.executable, "-m", "nibblecast", *arguments]
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode in (0, 2, 3)
    assert_hushed(done.stdout, done.stderr, *(path.read_text() for path in tmp_path.glob("*.html")))


def test_options_and_failures_of_whatever_kind() -> None:
    url = f"https://HUSHUSER:HUSHPASS@host/{QUERY}"
    request = Request(options={"a": url, "b": 2})
    assert_hushed(request.text(["onnx"]))
    assert request.text(["onnx"]).endswith("options=[a=https://***@host/?X-Amz-Signature=***&token=***#***,b=2]")
    failure = Failure(1, f"m: ClientError: {url} said\nno, and {'x' * 1_000_000}")
    assert_hushed(failure.message)
    assert failure.message.isprintable()
    assert len(failure.message) < 4_000


def test_credentials_of_a_target_are_in_no_message_and_in_no_report(
    store: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    """Names of outputs begin with the target's: its bucket, and not who writes to it."""
    (tmp_path / "in").mkdir()
    for name in ("m.tflite", "m.task"):
        (tmp_path / "in" / name).write_bytes(INT4.read_bytes())
    with pytest.raises(UsageError, match="would be written for") as caught:
        nibblecast.batch(tmp_path / "in", "memory://HUSHUSER:HUSHPASS@out", "safetensors", include=["*"])
    assert_hushed(caught.value)
    result = nibblecast.batch(tmp_path / "in", "memory://HUSHUSER:HUSHPASS@out", "safetensors", include=["*.tflite"])
    assert_hushed(json.dumps([json.loads(record.line()) for record in result.records]))
