"""Parts that pages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files

from autoq.report.markup import Markup, join, tag


def document(title: str, sections: Iterable[Markup]) -> str:
    """A whole page that fetches nothing from anywhere."""
    style = Markup(files("autoq.report").joinpath("page.css").read_text(encoding="utf-8"))
    head = join(
        [
            Markup('<meta charset="utf-8">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            tag("title", title),
            tag("style", style),
        ]
    )
    body = tag("body", join(sections, "\n"))
    return f'<!DOCTYPE html>\n<html lang="en">\n{tag("head", head)}\n{body}\n</html>\n'


def section(title: str, content: Markup) -> Markup:
    """A part of the page under its heading."""
    return tag("section", tag("h2", title), content)


def tile(name: str, value: str, more: str) -> Markup:
    """One number, large, with what it is above it and more about it below."""
    return tag(
        "div",
        tag("span", name, class_="name"),
        tag("b", value),
        tag("span", more, class_="more"),
        class_="tile",
    )


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    number_columns: Iterable[int] = (),
) -> Markup:
    """A table of rows.

    Args:
        head: the columns' titles; none for a table of names and values.
        number_columns: columns that hold numbers, which stand at the right.
    """
    numeric = set(number_columns)

    def line(cells: Sequence[object], name: str) -> Markup:
        return tag(
            "tr",
            *(
                tag(name, cell, class_="number" if index in numeric else None)
                for index, cell in enumerate(cells)
            ),
        )

    top = tag("thead", line(head, "th")) if head else Markup()
    return tag("table", top, tag("tbody", *(line(row, "td") for row in rows)))
