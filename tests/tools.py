"""Compilers, emulators, build tools and a browser: where one is missing, its tests are skipped, and the reason says
what to install; where NIBBLECAST_REQUIRE_TARGETS is set, as .ci/run does, they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import NoReturn

import pytest


def need(tools: Iterable[str], packages: str) -> None:
    """Skips the test, or in CI fails it, unless the commands are there."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        unavailable(f"needs {', '.join(missing)}: apt-get install --no-install-recommends {packages}")


def path(tool: str) -> str:
    """Where a command that is needed is."""
    found = shutil.which(tool)
    assert found is not None
    return found


def unavailable(reason: str) -> NoReturn:
    """Skips the test, or in CI fails it."""
    if os.environ.get("NIBBLECAST_REQUIRE_TARGETS"):
        pytest.fail(reason)
    pytest.skip(reason)
