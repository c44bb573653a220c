"""Markup that escapes by default: a plain string is text, only `Markup` is taken as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML or SVG already."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """`text` made safe for element content and quoted attributes."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Markup:
    """The parts one after the other, each escaped unless it is markup."""
    return Markup(separator.join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; attributes of value None are left out.

    `class_` gives `class`, `stroke_width` gives `stroke-width`; floats are written to two decimals.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def _attribute(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
