"""How many rows an engine counts in a matrix, where it wants them divisible by something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoq.export._aliases import experts_parent, fused_siblings
from autoq.export.checkup._modules import StoredModule
from autoq.formats import Container, FormatName, Support


def counted_rows(
    record: Support,
    container: Container,
    fmt: FormatName,
    modules: Mapping[str, StoredModule],
    module: StoredModule,
    config: Mapping[str, Any],
) -> tuple[int, ...]:
    """Each number of rows that has to fit: of all that is fused together, or of each part.

    Args:
        config: config.json's; it says how a matrix that is stored fused, as Phi-3's, is divided.
    """
    if record.counts_fused_rows:
        fused = None if experts_parent(module.name) else fused_siblings(module.name, modules)
        names = fused[1] if fused else (module.name,)
        return (sum(_rows(modules[name], container, fmt) for name in names),)
    rows = _rows(module, container, fmt)
    return _parts(module.name.rpartition(".")[2], rows, config)


def _rows(module: StoredModule, container: Container, fmt: FormatName) -> int:
    return (module.shape(container, fmt) or (0, 0))[0]  # of no shape: a fault already


def _parts(leaf: str, rows: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    if leaf == "gate_up_proj":
        return (rows // 2,)
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if leaf != "qkv_proj" or type(heads) is not int or type(shared) is not int:
        return (rows,)
    head = rows // max(heads + 2 * shared, 1)
    return (heads * head, shared * head)
