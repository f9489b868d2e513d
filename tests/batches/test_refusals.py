"""Lists that are refused before anything is done, and that a store hears of every record in time."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

import nibblecast
from nibblecast.converters.batches.records import REPORT
from nibblecast.converters.batches.run import BatchSettings
from nibblecast.converters.batches.sources import find_sources
from nibblecast.converters.batches.stores import LocalFolder
from nibblecast.converters.errors import UsageError

MODEL = Path(__file__).parents[2] / "fixtures" / "tflite" / "mlp_float32.tflite"


def listed(folder: Path, *lines: object) -> Path:
    path = folder / "list.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def remote() -> str:
    """The URL of a model in memory."""
    fsspec.filesystem("memory").pipe_file("/lists/m.tflite", MODEL.read_bytes())
    return "memory://lists/m.tflite"


def test_a_list_has_paths_or_urls(remote: str, tmp_path: Path) -> None:
    for lines in ((MODEL, remote), (remote, MODEL)):
        with pytest.raises(UsageError, match=r"list\.txt: .*paths and URLs"):
            find_sources(listed(tmp_path, *lines))
    assert [source.name for source in find_sources(listed(tmp_path, remote))] == ["m.tflite"]
    assert [source.name for source in find_sources(listed(tmp_path, MODEL))] == [MODEL.name]


@pytest.mark.parametrize("url", ["memory://lists/no.tflite", "memory://lists/nothing/"])
def test_a_list_of_urls_that_are_not_there(url: str, remote: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{url}: is in the list .*does not exist"):
        find_sources(listed(tmp_path, remote, url))


def test_a_store_is_told_of_every_record_while_the_batch_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is killed has then lost no more than what came last."""
    heard: list[int] = []
    target = tmp_path / "out"

    def reported(_: LocalFolder) -> None:
        heard.append(len((target / REPORT).read_text().splitlines()))

    monkeypatch.setattr(LocalFolder, "reported", reported)
    sources = [tmp_path / "in" / f"{name}.tflite" for name in "ab"]
    sources[0].parent.mkdir()
    for source in sources:
        source.write_bytes(MODEL.read_bytes())
    nibblecast.batch(tmp_path / "in", target, to="safetensors", settings=BatchSettings(jobs=1))
    assert heard
    assert heard[-1] == len(sources)
