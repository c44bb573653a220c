"""What SGLang's classes of models do that a checkpoint has to know of; read in SGLang 0.5.23."""

from __future__ import annotations

NAMES_OF_FUSED_PARTS = frozenset(
    {"deepseek_v2", "deepseek_v3", "gemma2", "gemma3", "gemma3_text", "llama4", "qwen3_moe"}
)
"""Model types whose SGLang classes say what they fuse; for others it looks for the fused name."""

RENAMING_SCALES = frozenset(
    {"internlm3", "llama", "llama4_text", "ministral3", "mistral", "phi3", "teleflm"}
)
"""Model types of SGLang's Llama class, which renames `weight_scale_inv` while it loads: those of
blocks, which are stored so, and of MXFP8, which SGLang has renamed to that itself."""

OTHER_SCALE = (
    "SGLang's class for Llama and its like renames weight_scale_inv to weight_scale, passes over that "
    "with a warning, and multiplies by scales that nobody has set"
)
