"""The key/value cache of a plan, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoq.report.numbers import loss_text

if TYPE_CHECKING:
    from autoq.report._data import CacheRow


def cache_text(cache: CacheRow) -> str:
    """For example "fp8, 8 bits per element, 1,536 bytes per token, predicted loss 4.2e-05"."""
    return ", ".join(cache_words(cache))


def cache_words(cache: CacheRow) -> tuple[str, str]:
    """The cache's formats, and what they take and lose."""
    formats = next(iter(cache.formats))
    if len(cache.formats) > 1:
        most_first = sorted(cache.formats.items(), key=lambda entry: (-entry[1], entry[0]))
        formats = ", ".join(
            f"{name} in {count} layer{'s' if count > 1 else ''}" for name, count in most_first
        )
    parts = []
    if cache.bits is not None:
        parts.append(f"{cache.bits:.4g} bits per element")
    if cache.bytes_per_token is not None:
        parts.append(f"{cache.bytes_per_token:,.0f} bytes per token")
    parts.append(f"predicted loss {loss_text(cache.predicted_loss)}")
    return formats, ", ".join(parts)
