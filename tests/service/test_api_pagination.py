"""Cursors that come back, and those that nobody gave."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.errors import InputError
from autoq.service.pagination import decode_cursor, encode_cursor


def encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def test_what_was_encoded_comes_back() -> None:
    cursor = encode_cursor("studies", "2026-01-01T00:00:00.000000", 17)
    assert decode_cursor("studies", cursor, str, int) == ("2026-01-01T00:00:00.000000", 17)


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "!",
        "a",
        "ü",
        "x" * 3_000,
        encoded({"studies": 1}),
        encoded(17),
        encoded(["jobs", "a", 1]),
        encoded(["studies", "a"]),
        encoded(["studies", "a", "1"]),
        encoded(["studies", "a", True]),
        encoded(["studies", "a", 1.0]),
        encoded(["studies", "a", 2**63]),
        encoded(["studies", "a\0b", 1]),
        encoded(["studies", "\ud800", 1]),
        base64.urlsafe_b64encode(b"[" * 1_200).decode(),
    ],
)
def test_a_cursor_that_nobody_gave_is_refused(cursor: str) -> None:
    with pytest.raises(InputError, match="next_cursor"):
        decode_cursor("studies", cursor, str, int)


@given(st.text(max_size=60))
def test_any_text_is_refused_or_read(text: str) -> None:
    with pytest.raises(InputError):
        decode_cursor("studies", text, str, int)
