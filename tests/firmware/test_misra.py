"""Which rules of MISRA C:2012 the generated C departs from, as far as cppcheck's addon sees them: no others.

This is no claim of compliance; docs/firmware-targets.md has the same list.
"""

from __future__ import annotations

import re
import subprocess
from shutil import copy

import pytest

from tests.firmware import models
from tests.firmware.targets import HERE
from tests.tools import need, unavailable

pytestmark = [pytest.mark.firmware, pytest.mark.slow]

#: Other versions know other rules.
VERSION = "Cppcheck 2.10"
OPTIONS = "-q --addon=misra --std=c99 --enable=warning,style,performance,portability --template={file}:{id}".split()

DEVIATIONS = {
    "2.5": "macros that this program does not use: they are for others",
    "7.2": "the addon's opinion of int64_t literals, which are signed and need no suffix",
    "8.7": "arrays are external, for kernels to be called with, though nothing but the table uses them here",
    "10.3": "int takes the result of a comparison; as in all of C, there is no Boolean type without <stdbool.h>",
    "10.4": "uint8_t is compared with constants of type int",
    "10.8": "an expression of unsigned int is cast to int; its value is below 16",
    "11.5": "data of all types goes through const void *",
    "12.1": "parentheses that the precedence of operators makes unnecessary",
    "14.4": "an int that is 0 or 1 is a condition",
    "15.5": "functions with several returns",
    "15.7": "an else-if without an else",
    "17.8": "a parameter is changed",
    "18.4": "a pointer is moved by +",
    "20.7": "the name of a type, a macro's parameter, cannot be in parentheses",
    "20.10": "# makes the text of a pragma, for IAR",
}


def test_deviations(tmp_path):
    need(["cppcheck"], "cppcheck")
    found = subprocess.run(["cppcheck", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if found != VERSION:
        unavailable(f"needs {VERSION}, found {found}")
    models.write(models.model_of("types_zoo"), tmp_path)
    copy(HERE / "user.c", tmp_path)
    command = ["cppcheck", *OPTIONS, "weights.c", "user.c"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    findings = {line for line in result.stderr.splitlines() if not line.startswith("user.c:")}
    rules = {match[1] for line in findings if (match := re.fullmatch(r"\S+:misra-c2012-([0-9.]+)", line))}
    assert not {line for line in findings if ":misra-c2012-" not in line}
    assert rules == set(DEVIATIONS)


def test_documentation_lists_them():
    text = (HERE.parents[1] / "docs" / "firmware-targets.md").read_text("utf-8")
    assert re.findall(r"^\| ([0-9.]+) \|", text, re.MULTILINE) == list(DEVIATIONS)
