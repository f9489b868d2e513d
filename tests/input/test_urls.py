"""What is secret in URLs, out of any text."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nibblecast.converters.errors import UsageError
from nibblecast.converters.input.urls import without_credentials, without_secrets
from tests.growth import assert_linear


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "https://u:p@h/x?X-Amz-Signature=abc&b=c#frag: is gone",
            "https://***@h/x?X-Amz-Signature=***&b=***#***: is gone",
        ),
        ("https:/u:p@h/x?y=z", "https:/***@h/x?y=***"),  # a Path has one slash
        ("URL('https://h/x?sig=s')", "URL('https://h/x?sig=***')"),
        ('{"url":"https://h/x?sig=s","b":1}', '{"url":"https://h/x?sig=***","b":1}'),
        ("<https://h/x?sig=s> and <https://token@h2/>", "<https://h/x?sig=***> and <https://***@h2/>"),
        ("zip://a.tflite::https://u:p@h/a.zip?sig=1", "zip://a.tflite::https://***@h/a.zip?sig=***"),
        ("simplecache::s3://key:secret@bucket/x", "simplecache::s3://***@bucket/x"),
        ("http://u:p@[::1]:80/x?y", "http://***@[::1]:80/x?***"),
        ("https://h?next=https://u:p@h2/x?y=z", "https://h?next=***"),
        ("https://h/a?c2VjcmV0Cg==", "https://h/a?***"),
        ("https://h/#access_token=5", "https://h/#***"),
        ("https://u:p/a@h/x", "https://***@h/x"),  # not as URLs are to be, but as they are typed
        ("https://u:p?a@h/x", "https://***?***"),
        ("https://u:p#a@h/x", "https://***#***"),
        ("https://u:p::q@h/x", "https://***@h/x"),
        ("HTTPS://U:P@H/x?SIG=s\nhttps://v:q@h", "HTTPS://***@H/x?SIG=***\nhttps://***@h"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "must be dask or dask://HOST:PORT",
        "hf://user/repo@main/model.gguf",
        "s3://bucket/a/b.tflite: does not exist",
        "https://h:8080/x?",
        "C:/a@b",
        "/a/b@c/d?e=f#g",
        "a tensor 'x:0', and 50% of what?",
        "",
    ],
)
def test_what_has_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("before", "repeated", "after"),
    [
        ("", "a", ":/"),
        ("", "a:/", ""),
        ("", "ab:/@", ""),
        ("", "ab://x:y/", "@"),
        ("https://", "a:b@", ""),
        ("ab:/?", "&", ""),
        ("ab:/?", "a=b#", ""),
        ("ab://", "::", ""),
        ("", " ab:/", ""),
        ("", "ab:/::", ":"),
    ],
)
def test_it_takes_time_in_proportion_to_the_text(before: str, repeated: str, after: str) -> None:
    def make(count: int) -> Callable[[], object]:
        text = before + repeated * count + after
        return lambda: without_secrets(text)

    assert_linear(make, 50_000)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://u:p@h/d/x.tflite?sig=1#a", "https://h/d/x.tflite"),
        ("zip://a::https://u:p@h/x#a", "zip://a::https://h/x"),
        ("s3://key:secret@bucket", "s3://bucket"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("hf://user/repo@main/x", "hf://user/repo@main/x"),
        ("https://u:p/a@h/x", "https://h/x"),
    ],
)
def test_the_place_that_a_url_names(url: str, place: str) -> None:
    assert without_credentials(url) == place


def test_errors_show_none() -> None:
    error = UsageError("https://u:p@h/x?sig=s: is gone", tensor="s3://k:s@b")
    assert str(error) == "tensor 's3://***@b': https://***@h/x?sig=***: is gone"
