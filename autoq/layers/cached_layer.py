"""An attention layer that caches keys and values: its shape, and what calibration saw."""

from __future__ import annotations

from dataclasses import dataclass

from autoq.formats import FormatName
from autoq.formats.kv_cache import KV_CACHE_FORMATS


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedLayer:
    """An attention that caches keys and values, and the largest magnitudes calibration saw."""

    name: str  # path of the attention module in the model
    key_heads: int
    key_dim: int  # elements of one head's key
    value_heads: int
    value_dim: int
    key_amax: float = 0.0
    value_amax: float = 0.0

    @property
    def elements(self) -> int:
        """Cached for every token."""
        return self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def misfit(self, fmt: FormatName) -> str | None:
        """Why the layer cannot cache in a format; None if it can.

        Raises:
            UnknownNameError: nothing has the format's name.
        """
        block = KV_CACHE_FORMATS[fmt].block_size
        if block is None:
            return None
        for what, size in (("keys", self.key_dim), ("values", self.value_dim)):
            if size % block:
                return (
                    f"{fmt} needs heads whose size is divisible by {block}, and {what} of "
                    f"{self.name} have {size}"
                )
        return None
