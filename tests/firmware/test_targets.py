"""Generated C decodes to the same bits on every target: compiled as firmware is, and run.

docs/firmware-targets.md says what is proved where.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.firmware import models
from tests.firmware.targets import HERE, HERE_TOO, Target, call, compiled, need_target, run

pytestmark = pytest.mark.firmware

by_name = {"ids": lambda value: value.name if isinstance(value, Target) else value}
CASES = [(target, name) for target in HERE_TOO for name in (*models.SMALL, *(() if target.avr else models.LARGE))]


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
    sources = models.write(model, tmp_path, "split")
    objects = [*objects, *compiled(target, [HERE / "walk_all.c", *sources], tmp_path)]
    assert run(target, objects, tmp_path) == (0, models.expected(model))


@pytest.mark.parametrize("target", HERE_TOO, **by_name)
def test_values_of_single_header(tmp_path, common, target):
    objects = common(target, "port.c", target.port)
    model = models.model_of("mlp_int4_asymmetric")
    models.write(model, tmp_path, "header")
    sources = [HERE / "walk_all.c", HERE / "checksums.c"]
    objects = [*objects, *compiled(target, sources, tmp_path, "-DSINGLE_HEADER")]
    assert run(target, objects, tmp_path) == (0, models.expected(model))


@pytest.mark.parametrize("program", ["bad_status.c", "bad_fault.c"])
@pytest.mark.parametrize("target", HERE_TOO, **by_name)
def test_failure_is_seen(tmp_path, common, target, program):
    objects = [*common(target, "port.c", target.port), *compiled(target, [HERE / program], tmp_path)]
    assert run(target, objects, tmp_path) == ({"bad_status.c": 7, "bad_fault.c": target.fault}[program], [])


def test_vector_instructions_are_tried(tmp_path):
    """Of what runs on the Cortex-M55, at least the unpacking is done by MVE."""
    target = next(target for target in HERE_TOO if target.name == "cortex-m55-mve")
    need_target(target, tmp_path)
    call([*target.compile.split(), f"-I{models.RUNTIME}", "-S", str(HERE / "checksums.c")], tmp_path)
    assert re.search(r"^\s+vshr\.\w+\s+q\d", (tmp_path / "checksums.s").read_text("ascii"), re.MULTILINE)
