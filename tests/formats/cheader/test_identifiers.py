"""Names of any kind become identifiers, comments and strings that leave the C as it is."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibblecast.converters.errors import UsageError
from nibblecast.formats.cheader.identifiers import (
    MAX_IDENTIFIER,
    MAX_PREFIX,
    MAX_STRING,
    Identifiers,
    checked_prefix,
    comment,
    includable,
    prefix_of,
    string_literal,
)

SUFFIXES = ("_data", "_scale", "_COUNT", "_SCALE_COUNT")
IDENTIFIER = re.compile(r"[A-Za-z](_?[A-Za-z0-9])*")
any_text = st.text(st.characters(codec=None), max_size=200)  # surrogates included


def claimed(names, prefix="model"):
    identifiers = Identifiers(prefix, ())
    return [identifiers.claim(name, SUFFIXES) for name in names]


@given(st.lists(any_text, unique=True, max_size=20), any_text)
def test_identifiers_are_valid_and_different(names, stem):
    prefix = prefix_of(stem)
    bases = claimed(names, prefix)
    identifiers = [base + suffix for base in bases for suffix in SUFFIXES]
    assert len(set(identifiers)) == len(identifiers)
    for identifier in identifiers:
        assert IDENTIFIER.fullmatch(identifier)
        assert len(identifier) <= MAX_IDENTIFIER
        assert identifier.startswith(f"{prefix}_")
    assert claimed(names, prefix) == bases


@given(any_text)
def test_prefix(stem):
    prefix = prefix_of(stem)
    assert IDENTIFIER.fullmatch(prefix)
    assert len(prefix) <= MAX_PREFIX
    assert checked_prefix(prefix) == prefix


@pytest.mark.parametrize(
    ("stem", "prefix"),
    [
        ("weights", "weights"),
        ("my-model.v2", "my_model_v2"),
        ("2nd", "model_2nd"),
        ("", "model"),
        ("é/*", "model"),
        ("__init__", "init"),
        ("Nibblecast", "model_Nibblecast"),
    ],
)
def test_prefix_of_stem(stem, prefix):
    assert prefix_of(stem) == prefix


@pytest.mark.parametrize("prefix", ["", "2nd", "a__b", "a_", "_a", "a-b", "a" * 25, "nibblecast", "é", "a\n"])
def test_prefix_option_is_refused(prefix):
    with pytest.raises(UsageError, match="prefix="):
        checked_prefix(prefix)


def test_plain_names_stay_readable():
    assert claimed(["conv1/kernel:0", "dense.weight"]) == ["model_conv1_kernel_0", "model_dense_weight"]


def test_names_that_sanitise_alike_stay_distinct():
    first, second = claimed(["a/b", "a.b"])
    assert first == "model_a_b"
    assert re.fullmatch(r"model_a_b_[0-9a-f]{8}", second)


def test_a_name_is_not_taken_for_the_part_of_another():
    identifiers = [base + suffix for base in claimed(["a", "a_SCALE"]) for suffix in SUFFIXES]
    assert len(set(identifiers)) == len(identifiers)


@given(any_text)
def test_comment_ends_nothing_and_opens_nothing(text):
    escaped = comment(text)
    assert re.fullmatch("[ -~]*", escaped)
    assert not any(dangerous in escaped for dangerous in ("*/", "/*", "??"))


def test_comment_tells_texts_apart():
    assert comment("a\\x2f") == "a\\\\x2f"
    assert comment("*/ ??/ é \u2028 \n") == "*\\x2f ?\\x3f/ \\xe9 \\u2028 \\x0a"


@given(any_text)
def test_string_literal_holds_the_bytes(text):
    literal = string_literal(text)
    assert re.fullmatch(r'"([ !#->@-\[\]-~]|\\[0-7]{3})*"', literal)
    decoded = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), literal[1:-1])
    assert decoded.encode("latin-1") == text.encode("utf-8", "surrogatepass")


def test_string_literal_is_no_longer_than_every_compiler_takes():
    assert string_literal("a" * 5000) == f'"{"a" * MAX_STRING}"'


@pytest.mark.parametrize("name", ['a".h', "a\\b.h", "a\n.h", "é.h", "a??!.h"])
def test_file_names_that_cannot_be_included(name):
    assert not includable(name)
    assert includable("weights-v2 (final).h")
