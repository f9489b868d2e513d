"""The page as a file: whole in itself, escaped, the same each time; and the command that writes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

import nibblecast
from nibblecast.converters.batches.records import REPORT
from nibblecast.converters.errors import CorruptFile, UsageError
from nibblecast.converters.reports import plots
from nibblecast.converters.reports.counts import CodeCounts
from nibblecast.converters.reports.words import count_text, number, percent, seconds_text, shown
from nibblecast.converters.sizes import bytes_text
from tests.reports import samples

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
INT4 = ROOT / "fixtures" / "tflite" / "cnn_int4_per_channel.tflite"
FLOATS = ROOT / "fixtures" / "tflite" / "mlp_float32.tflite"
TAGS = frozenset(
    "a body button caption dd details div dl dt footer h1 h2 head header html input label li main meta nav p path "
    "script section span style summary svg table tbody td text th thead title tr ul wbr".split()
)


class Parsed(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nibblecast", "report", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module", params=["model", "hostile model", "batch"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    source = {
        "model": lambda: INT4,
        "hostile model": lambda: samples.hostile_model(folder),
        "batch": lambda: samples.batch(folder / "batch"),
    }[request.param]()
    nibblecast.report(source, folder / "page.html")
    return folder / "page.html"


def test_nothing_is_loaded_from_outside(page: Path) -> None:
    parsed = Parsed(page)
    assert set(parsed.tags) <= TAGS
    for name, value in parsed.attributes:
        assert name not in ("src", "srcset", "style", "action", "xlink:href", "data")
        assert not name.startswith("on")
        assert name != "href" or value.startswith("#")
    text = page.read_text("utf-8")
    assert not re.search(r"https?:|url\(|@import|//\w", text)


def test_style_and_script_are_those_that_the_policy_names(page: Path) -> None:
    text = page.read_text("utf-8")
    policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert len(policy) == 1
    for tag in ("style", "script"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(found) == 1
        digest = b64encode(sha256(found[0].encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{digest}&#39;" in policy[0]
    assert policy[0].startswith("default-src &#39;none&#39;;")


def test_no_identifier_is_there_twice_and_every_link_leads_somewhere(page: Path) -> None:
    attributes = Parsed(page).attributes
    identifiers = [value for name, value in attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert {value[1:] for name, value in attributes if name == "href"} <= set(identifiers)


@pytest.mark.parametrize("what", ["model", "batch"])
def test_hostile_names_are_text(what: str, tmp_path: Path) -> None:
    source = samples.hostile_model(tmp_path) if what == "model" else samples.batch(tmp_path / "batch")
    nibblecast.report(source, tmp_path / "page.html", title="<i>title</i>\u202e")
    parsed = Parsed(tmp_path / "page.html")
    assert parsed.text.count("<i>title</i>\\u202e") == 2
    for name in samples.HOSTILE:
        assert shown(name) in parsed.text
    text = (tmp_path / "page.html").read_text("utf-8")
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "n" * 500 not in text
    assert "49" not in [line.strip() for line in parsed.text.splitlines() if "raw" in line]


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    batch = samples.batch(tmp_path / "batch")
    (tmp_path / "own").write_text("font.size: 30\naxes.grid: False\nxtick.major.size: 9\nsvg.fonttype: path\n")
    for source in (INT4, batch):
        for seed, settings in (("1", ""), ("2", str(tmp_path / "own"))):
            done = run(source, "-o", tmp_path / f"{seed}.html", PYTHONHASHSEED=seed, MATPLOTLIBRC=settings)
            assert done.returncode == 0, done.stderr
            assert re.fullmatch(r".*\.html \(\d+\.\d KiB\)\n", done.stdout)
        assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


def test_the_bars_of_a_figure_are_as_high_as_the_counts() -> None:
    wanted = (0, 3, 1, 12, 0, 7)
    with plots.drawing():
        figure = plots.codes_plot(CodeCounts(tuple(range(-3, 3)), wanted), "Codes <&>")
    assert 'aria-label="Codes &lt;&amp;&gt;: histogram from -3 to 2, most often 0, 2 of 6 unused"' in figure
    outline = re.search(r'<path d="([^"]*)" class="fill-first"', figure)
    assert outline is not None
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", outline[1])]
    ground, bars = heights[0], heights[1:-1:2]
    assert [round(12 * (ground - y) / (ground - min(bars))) for y in bars] == list(wanted)


def test_the_numbers_come_as_json() -> None:
    done = run(INT4, "--json", "--only", "*conv*")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [tensor["name"] for tensor in document["tensors"] if tensor["codes"]] == ["cnn_1/conv_1/convolution"]
    assert document == nibblecast.report(INT4, only=["*conv*"]).document()
    tensor = next(tensor for tensor in document["tensors"] if tensor["codes"])
    assert sum(tensor["codes"]["counts"]) == tensor["elements"] == 216
    assert tensor["codes"]["values"] == list(range(-8, 8))


def test_a_batch_has_failures_first_by_exit_code(tmp_path: Path) -> None:
    folder = samples.batch(tmp_path / "batch")
    document = nibblecast.report(folder).document()
    assert document == nibblecast.report(folder / REPORT).document()
    failed = len(samples.HOSTILE)
    assert (document["models"], document["failed"]) == (9 + failed, failed)
    assert document["exit_codes"] == {"3": 4, "4": 4, "5": 4}
    codes = [record["failure"]["exit_code"] for record in document["records"][:failed]]
    assert codes == sorted(codes)
    assert all(record["status"] == "done" for record in document["records"][failed:])
    assert document["bytes"] == sum(1000 * (i + 1) for i in range(8))
    assert document["peak_memory"] == 1 << 30


def test_a_reference_adds_errors(tmp_path: Path) -> None:
    nibblecast.convert(FLOATS, tmp_path / "codes.safetensors", quantize="int4,block=8")
    page = tmp_path / "page.html"
    report = nibblecast.report(tmp_path / "codes.safetensors", page, reference=FLOATS)
    accuracy = report.document()["accuracy"]
    assert f"{accuracy['signal_to_noise_db']:.1f} dB" in page.read_text("utf-8")
    assert "Mean square error" in page.read_text("utf-8")
    assert "Infinity" in page.read_text("utf-8")  # biases are not quantized: no error at all


def test_what_it_refuses(tmp_path: Path) -> None:
    batch = samples.batch(tmp_path / "batch")
    model = tmp_path / "model.tflite"
    model.write_bytes(INT4.read_bytes())
    (tmp_path / "linked.html").hardlink_to(model)
    (tmp_path / "model.html").symlink_to(model)
    (tmp_path / "empty.jsonl").write_text("\n{}\n")
    line = samples.Record("odd", "", "", seconds=1).line().replace('"seconds": 1', '"seconds": NaN')
    (tmp_path / "odd.jsonl").write_text(line)
    for source, target, more, error, message in (
        (INT4, tmp_path / "page.txt", {}, UsageError, "ends in .html"),
        (model, tmp_path / "linked.html", {}, UsageError, "is both the input and the output"),
        (model, tmp_path / "model.html", {}, UsageError, "is both the input and the output"),
        (FLOATS, tmp_path / "linked.html", {"reference": model}, UsageError, "is both the input"),
        (INT4, tmp_path / "no" / "page.html", {}, UsageError, "cannot be written"),
        (INT4, None, {"reference": ROOT / "fixtures/gguf/types.gguf"}, UsageError, "same name and shape"),
        (INT4, None, {"only": ["nothing"]}, UsageError, "no tensor matches"),
        (INT4, None, {"colour": "red"}, UsageError, "has an option 'colour'"),
        (batch, None, {"only": ["*"]}, UsageError, "do not apply to the report of a batch"),
        (tmp_path / "empty.jsonl", None, {}, CorruptFile, "contains no records"),
        (tmp_path / "odd.jsonl", None, {}, CorruptFile, "contains no records"),
        (tmp_path / "gone.jsonl", None, {}, CorruptFile, "No such file"),
        (tmp_path / "gone.gguf", None, {}, CorruptFile, "No such file"),
    ):
        with pytest.raises(error, match=message):
            nibblecast.report(source, target, **more)
    assert not list(tmp_path.glob(".*"))
    done = run(INT4)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "-o FILE.html" in done.stderr


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_and_the_old_page_stays(package: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    program = (
        f"import sys\nsys.modules['{package}'] = None\nfrom nibblecast.converters.cli import main\n"
        f"sys.argv = ['nibblecast', 'report', {str(INT4)!r}, '-o', {str(tmp_path / 'page.html')!r}]\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stderr == f"nibblecast: a page needs the package '{package}': pip install 'nibblecast[report]'\n"
    assert (tmp_path / "page.html").read_text() == "old"


def test_a_model_without_tensors_has_a_page(tmp_path: Path) -> None:
    samples.save_file({}, tmp_path / "none.safetensors")
    nibblecast.report(tmp_path / "none.safetensors", tmp_path / "page.html")
    assert "none.safetensors" in Parsed(tmp_path / "page.html").text


def test_numbers_in_words() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1024, 1536, 5 << 30)] == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 GiB"]
    assert [count_text(n) for n in (0, 12, 1200, 3e6, 2e9)] == ["0", "12", "1.2k", "3M", "2G"]
    assert [number(n) for n in (-6, 57344.0, 0.07031, 1.2345e-5, 1e30)] == [
        "-6",
        "57344",
        "0.0703",
        "1.23e-05",
        "1e+30",
    ]
    assert [percent(n) for n in (0, 1e-9, 0.0312, 1)] == ["0.00 %", "< 0.01 %", "3.12 %", "100.00 %"]
    assert [seconds_text(n) for n in (0.1234, 59.9, 125, 12000)] == ["0.123 s", "59.9 s", "2 min 5 s", "3 h 20 min"]
