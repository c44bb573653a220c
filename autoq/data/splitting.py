"""Which part of a finite source calibration may see, and which is held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol, Self, TypeAlias, TypeVar

Split: TypeAlias = Literal["calibration", "held_out"]
"""Whether data may be calibrated on, or is kept apart to measure with."""


class Sliceable(Protocol):
    """A document or a row of tokens: has a length and can be cut."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> Self: ...


Item = TypeVar("Item", bound=Sliceable)
Item_co = TypeVar("Item_co", covariant=True)


class Items(Protocol[Item_co]):
    """Documents or rows that are read one by one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item_co: ...


def part(items: Items[Item], split: Split, held_out_share: float) -> Iterator[Item]:
    """Yield the items of one part: calibration's from the front, held-out's from the back.

    The border lies at `(1 - held_out_share) * len(items)`, and cuts the item it falls into; so a
    source of one long document has both parts, and whatever is asked for, they never overlap.
    """
    border = len(items) * (1.0 - held_out_share)
    whole, fraction = int(border), border - int(border)
    if split == "calibration":
        for index in range(whole):
            yield items[index]
        if fraction:
            yield items[whole][: _cut(items[whole], fraction)]
        return
    first_whole = whole + 1 if fraction else whole
    for index in range(len(items) - 1, first_whole - 1, -1):
        yield items[index]
    if fraction:
        yield items[whole][_cut(items[whole], fraction) :]


def _cut(item: Sliceable, fraction: float) -> int:
    return int(len(item) * fraction)


def spread_part(items: Iterable[Item], split: Split, held_out_share: float) -> Iterator[Item]:
    """Yield the items of one part of a stream whose length is unknown, in order.

    Held-out items are spread evenly over the stream: at a share of 1/4 every fourth is one. So
    only as many are read as are asked for, and neither part depends on how many there are.
    """
    for index, item in enumerate(items):
        before, after = (math.floor(count * held_out_share) for count in (index, index + 1))
        if (after > before) == (split == "held_out"):
            yield item
