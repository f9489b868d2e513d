"""What is done once, before anything of the project is imported: workers are forked from what this leaves."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, suppress
from importlib.util import find_spec
from types import ModuleType
from typing import Any

#: The allowance for what grows: inputs are small, and thousands of them are to be tried.
_ENVIRONMENT = {"NIBBLECAST_MAX_EXPANSION": "4M", "NIBBLECAST_COMPILE_AFTER": "never", "MPLBACKEND": "svg"}
_PACKAGES = ("nibblecast",)
_COMPILED = "compiled_"  # how such modules are called: numba compiles what they hold, and has to see it as it is
_ALSO = ("importlib.metadata", "encodings.cp437", "jinja2", "matplotlib.backends.backend_svg", "onnx.checker")


def has_atheris() -> bool:
    """Whether coverage-guided fuzzing is possible here."""
    return find_spec("atheris") is not None


def prepare(*, guided: bool) -> None:
    """Imports all that an input may need, so that workers import nothing; for atheris, in a way that it sees."""
    os.environ.update(_ENVIRONMENT)
    sys.modules["torch"] = None  # type: ignore[assignment]  # its exporter takes seconds for each program
    with redirect_stderr(io.StringIO()), _seen_by_atheris() if guided else nullcontext():  # it names each module
        for package in map(importlib.import_module, _PACKAGES):
            _import_below(package)
    preload(_ALSO)
    importlib.import_module("nibblecast.converters.plugins").all_formats()  # which looks for plugins, once


def preload(names: Iterable[str]) -> None:
    """Imports further modules, as far as they are installed."""
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)


def _import_below(package: ModuleType) -> None:
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.rpartition(".")[2].startswith(_COMPILED) and not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError as error:  # of a runtime that is not installed
                if (error.name or "").startswith(_PACKAGES):
                    raise


def _seen_by_atheris() -> AbstractContextManager[Any]:
    import atheris

    return atheris.instrument_imports(include=list(_PACKAGES))
