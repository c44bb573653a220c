"""Token sequences for calibration and evaluation, from text or ids, always the same ones."""

from autoq.data.batches import batches
from autoq.data.sources import TokenData, load_token_sequences
from autoq.data.splitting import Split

__all__ = ["Split", "TokenData", "batches", "load_token_sequences"]
