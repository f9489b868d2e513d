"""Generated C decodes to the same bits on every target: compiled as firmware is, and run.

docs/firmware-targets.md says what is proved where.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.firmware import models
from tests.firmware.targets import HERE, HERE_TOO, Target, call, compiled, need_target, refusal, run

pytestmark = [pytest.mark.firmware, pytest.mark.slow]

by_name = {"ids": lambda value: value.name if isinstance(value, Target) else value}
CASES = [(target, name) for target in HERE_TOO for name in (*models.SMALL, *(() if target.avr else models.LARGE))]


def target_of(name: str) -> Target:
    return next(target for target in HERE_TOO if target.name == name)


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """Object files that all programs of a target have in common."""
    made: dict[tuple[str, ...], list[Path]] = {}

    def objects(target: Target, *sources: str) -> list[Path]:
        key = (target.name, *sources)
        if key not in made:
            folder = tmp_path_factory.mktemp(target.name)
            need_target(target, folder)
            made[key] = compiled(target, [HERE / name for name in sources], folder, f"-I{models.RUNTIME}")
        return made[key]

    return objects


@pytest.mark.parametrize(("target", "name"), CASES, **by_name)
def test_values(tmp_path, common, target, name):
    objects = common(target, "checksums.c", "port.c", target.port)
    model = models.model_of(name)
    sources = models.write(model, tmp_path)
    objects = [*objects, *compiled(target, [HERE / "walk_all.c", *sources], tmp_path)]
    assert run(target, objects, tmp_path) == (0, models.expected(model))


@pytest.mark.parametrize("target", HERE_TOO, **by_name)
def test_values_of_single_header(tmp_path, common, target):
    objects = common(target, "port.c", target.port)
    model = models.model_of("mlp_int4_asymmetric")
    models.write(model, tmp_path, layout="header")
    sources = [HERE / "walk_all.c", HERE / "checksums.c"]
    objects = [*objects, *compiled(target, sources, tmp_path, "-DSINGLE_HEADER")]
    assert run(target, objects, tmp_path) == (0, models.expected(model))


@pytest.mark.parametrize("target", HERE_TOO, **by_name)
def test_values_of_all_styles(tmp_path, common, target):
    """One program has the same model in each style that the target takes."""
    objects = common(target, "checksums.c", "port.c", target.port)
    model = models.model_of("mlp_int4_asymmetric")
    words = () if target.big_endian else ("words32", "words64")
    styles = ("incbin", "string", *words, *(("embed",) if target.embeds else ()))
    sources = [HERE / "walk_styles.c"]
    for style in styles:
        section = target.section if style == "incbin" else ""
        sources += models.write(model, tmp_path, f"as_{style}", style=style, section=section)
    defines = [*["-DBIG_ENDIAN_TARGET"] * target.big_endian, *["-DEMBEDS"] * target.embeds]
    objects = [*objects, *compiled(target, sources, tmp_path, *defines)]
    assert run(target, objects, tmp_path) == (0, models.expected(model) * len(styles))


@pytest.mark.parametrize("style", ["words32", "words64"])
def test_words_are_refused_where_the_high_byte_is_first(tmp_path, style):
    target = target_of("powerpc")
    need_target(target, tmp_path)
    (source,) = models.write(models.model_of("mlp_int4_asymmetric"), tmp_path, style=style)
    assert "these words are for little-endian processors" in refusal(target, source)


@pytest.mark.parametrize("target", [target for target in HERE_TOO if target.avr], **by_name)
def test_avr_is_told_where_files_go(tmp_path, target):
    """Without it they would be in RAM, whatever reads them."""
    need_target(target, tmp_path)
    (source,) = models.write(models.model_of("mlp_int4_asymmetric"), tmp_path, style="incbin")
    assert "--opt section=.progmem.data" in refusal(target, source)
    section = '-DNIBBLECAST_INCBIN_SECTION(name)=".section .progmem.data." name ",\\"a\\"\\n"'
    compiled(target, [source], tmp_path, section)


@pytest.mark.parametrize("layout", ["split", "header"])
def test_avr_refuses_float64(tmp_path, layout):
    """Its `double` has 32 bits."""
    target = target_of("atmega2560")
    need_target(target, tmp_path)
    models.write(models.model_of("types_zoo"), tmp_path, layout=layout)
    (tmp_path / "main.c").write_text('#include "weights.h"\n', "ascii")
    assert "double has fewer than 64 bits here" in refusal(target, tmp_path / "main.c")


@pytest.mark.parametrize("layout", ["split", "header"])
def test_avr_refuses_more_than_its_pointers_reach(tmp_path, layout):
    target = target_of("atmega2560")
    need_target(target, tmp_path)
    models.write(models.large_flash(), tmp_path, layout=layout)
    source = tmp_path / "main.c"
    source.write_text('#include "weights.h"\n', "ascii")
    assert "weights has 93600 bytes of arrays, of which pointers of 16 bits reach 65536" in refusal(target, source)
    source.write_text('#define NIBBLECAST_FAR\n#include "weights.h"\n', "ascii")  # the linker leaves enough out
    compiled(target, [source], tmp_path, "-Wno-unused-const-variable")


def test_more_than_64_kib_of_flash(tmp_path, common):
    target, step = target_of("atmega2560-memx"), 499
    objects = common(target, "port.c", target.port)
    model = models.large_flash()
    sources = [HERE / "walk_all.c", HERE / "checksums.c", *models.write(model, tmp_path, max_array=32767)]
    objects = [*objects, *compiled(target, sources, tmp_path, f"-DSTEP={step}u")]
    assert run(target, objects, tmp_path) == (0, models.expected(model, step))
    listed = subprocess.run(["avr-nm", "program"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    places = [int(place, 16) for place in re.findall(r"^(\w+) \w weights_\w+_data$", listed, re.MULTILINE)]
    assert len(places) == len(model)
    assert max(places) + model["first"].nbytes - min(places) > 1 << 16


@pytest.mark.parametrize("program", ["bad_status.c", "bad_fault.c"])
@pytest.mark.parametrize("target", HERE_TOO, **by_name)
def test_failure_is_seen(tmp_path, common, target, program):
    objects = [*common(target, "port.c", target.port), *compiled(target, [HERE / program], tmp_path)]
    assert run(target, objects, tmp_path) == ({"bad_status.c": 7, "bad_fault.c": target.fault}[program], [])


def test_vector_instructions_are_tried(tmp_path):
    """Of what runs on the Cortex-M55, at least the unpacking is done by MVE."""
    target = target_of("cortex-m55-mve")
    need_target(target, tmp_path)
    call([*target.compile.split(), f"-I{models.RUNTIME}", "-S", str(HERE / "checksums.c")], tmp_path)
    assert re.search(r"^\s+vshr\.\w+\s+q\d", (tmp_path / "checksums.s").read_text("ascii"), re.MULTILINE)
