"""transformers' own fp8 checkpoints: each engine's rule for what is left out, and our words for it.

Entries are taken for names; transformers takes them for regular expressions, in which those of
modules match themselves. Executed with transformers 5.23; read in vLLM 0.33, SGLang 0.5.23 and
TensorRT-LLM of about 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from autoq.export._aliases import experts_parent
from autoq.export._fp8_manifest import BLOCK_SIZE, our_name
from autoq.export.checkup._modules import StoredModule
from autoq.formats import Support, Target, Verdict

_FP8_UNITS_FROM = 89


def in_our_words(modules: Mapping[str, StoredModule]) -> dict[str, StoredModule]:
    """The modules with their tensors under the names that compressed-tensors has for them."""
    return {
        name: StoredModule(name, {our_name(key): one for key, one in module.tensors.items()})
        for name, module in modules.items()
    }


def is_head(module: str) -> bool:
    """Whether it is the output head, which no engine takes for blocks; many manifests omit it."""
    return module.rpartition(".")[2] == "lm_head"


def is_left_out(engine: str, module: str, entries: Iterable[str]) -> bool:
    """Whether the module is the head, or an entry of the manifest names it by the engine's rule."""
    return is_head(module) or any(_RULES[engine](module, entry) for entry in entries)


def has_other_blocks(module: StoredModule) -> bool:
    """Whether transformers divides a matrix into blocks of another height than the 128 it has."""
    weight = module.tensors.get("weight")
    rows = 0 if weight is None else weight.shape[0]
    return rows > BLOCK_SIZE[0] and rows % BLOCK_SIZE[0] != 0


def _exactly_or_all_experts(module: str, entry: str) -> bool:
    """vLLM: the name; experts are one module, which an entry that has its name in it leaves out."""
    parent = experts_parent(module)
    return module == entry if parent is None else parent in entry


def _with_or_without_model(module: str, entry: str) -> bool:
    return module.removeprefix("model.") == entry.removeprefix("model.")


def _at_an_end(module: str, entry: str) -> bool:
    """transformers: from the beginning to a dot, or the end of a name."""
    begins = re.match(rf"{re.escape(entry)}(?:(?<=\.)|(?=\.|$))", module) is not None
    return begins or module.endswith(entry)


_RULES: Mapping[str, Callable[[str, str], bool]] = {
    "vllm": _exactly_or_all_experts,
    "sglang": _with_or_without_model,
    "tensorrt-llm": fnmatchcase,
    "transformers": _at_an_end,
}


def in_own_container(record: Support, target: Target) -> Support:
    """SGLang finds the size of blocks here, and not in the groups of compressed-tensors."""
    capability = target.hardware.capability
    if target.engine.name != "sglang" or capability is None or capability < _FP8_UNITS_FROM:
        return record
    return replace(
        record,
        verdict=Verdict.NATIVE,
        reason="multiplied by FP8 matrix units",
        out_features_multiple=128,
    )
