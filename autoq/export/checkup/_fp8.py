"""transformers' own fp8 checkpoints: each engine's rule for what is left out, and our words for it.

Entries are taken for names; transformers takes them for regular expressions, in which those of
modules match themselves. Executed with transformers 5.23; read in vLLM 0.33, SGLang 0.5.23 and TensorRT-LLM of about 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from autoq.export._fp8_manifest import our_name
from autoq.export.checkup._modules import StoredModule


def in_our_words(modules: Mapping[str, StoredModule]) -> dict[str, StoredModule]:
    """The modules with their tensors under the names that compressed-tensors has for them."""
    return {
        name: StoredModule(name, {our_name(key): one for key, one in module.tensors.items()})
        for name, module in modules.items()
    }


def is_left_out(engine: str, module: str, entries: Iterable[str]) -> bool:
    """Whether one of the manifest's entries names the module, as the engine reads them."""
    return any(_RULES[engine](module, entry) for entry in entries)


def _exactly(module: str, entry: str) -> bool:
    return module == entry


def _with_or_without_model(module: str, entry: str) -> bool:
    return module.removeprefix("model.") == entry.removeprefix("model.")


def _at_an_end(module: str, entry: str) -> bool:
    """transformers: from the beginning to a dot, or the end of a name."""
    begins = re.match(rf"{re.escape(entry)}(?:(?<=\.)|(?=\.|$))", module) is not None
    return begins or module.endswith(entry)


_RULES: Mapping[str, Callable[[str, str], bool]] = {
    "vllm": _exactly,
    "sglang": _with_or_without_model,
    "tensorrt-llm": fnmatchcase,
    "transformers": _at_an_end,
}
