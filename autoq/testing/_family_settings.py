"""Configurations of tiny models, one for each family of the support table: plain data.

Widths are multiples of 128, so that every format applies; layers are few, but at least as many as a
family needs to show each kind of layer it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

FamilySettings: TypeAlias = tuple[str, str, Mapping[str, Any]]
"""Model class, configuration class and configuration; classes are transformers'."""

VOCABULARY_SIZE = 288
MAXIMUM_POSITIONS = 256
IMAGE_TOKEN = 287
"""In the place of an image; calibration texts of these models never hold it."""

_PAD, _BOS, _EOS = 0, 1, 2
_TOKENS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY_SIZE,
        "pad_token_id": _PAD,
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
    }
)
_ENCODER: Mapping[str, Any] = MappingProxyType(
    {
        **_TOKENS,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": MAXIMUM_POSITIONS,
    }
)
_DECODER: Mapping[str, Any] = MappingProxyType({**_ENCODER, "num_key_value_heads": 2})
_WIDE_HEADS: Mapping[str, Any] = MappingProxyType({**_DECODER, "head_dim": 32})
_VISION: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
)
_GEMMA3_TEXT: Mapping[str, Any] = MappingProxyType(
    {**_WIDE_HEADS, "query_pre_attn_scalar": 32, "sliding_window": 64}
)
_QWEN_VL_TEXT: Mapping[str, Any] = MappingProxyType(
    {
        **_DECODER,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 6, 6],
        },
    }
)
_QWEN_VL_TOKENS: Mapping[str, Any] = MappingProxyType(
    {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": IMAGE_TOKEN - 1,
        "vision_start_token_id": IMAGE_TOKEN - 2,
        "vision_end_token_id": IMAGE_TOKEN - 3,
    }
)
_LLAMA4_TEXT: Mapping[str, Any] = MappingProxyType(
    {
        **_WIDE_HEADS,
        "intermediate_size_mlp": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 64,
    }
)
_BART: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY_SIZE,
        "pad_token_id": _PAD,
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
        "decoder_start_token_id": _EOS,
        "d_model": 128,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
    }
)
T5: Mapping[str, Any] = MappingProxyType(
    {
        **_TOKENS,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 1,
        "num_heads": 4,
        "decoder_start_token_id": _PAD,
    }
)

FAMILY_SETTINGS: Mapping[str, FamilySettings] = MappingProxyType(
    {
        "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
        "llama3": (
            "LlamaForCausalLM",
            "LlamaConfig",
            {
                **_DECODER,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                "tie_word_embeddings": True,
            },
        ),
        "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", _LLAMA4_TEXT),
        "llama4_vision": (
            "Llama4ForConditionalGeneration",
            "Llama4Config",
            {
                "text_config": dict(_LLAMA4_TEXT),
                "vision_config": {
                    **_VISION,
                    "projector_input_dim": 128,
                    "projector_output_dim": 128,
                    "vision_output_dim": 128,
                    "pixel_shuffle_ratio": 0.5,
                },
                "image_token_index": IMAGE_TOKEN,
            },
        ),
        "mistral": ("MistralForCausalLM", "MistralConfig", _WIDE_HEADS),
        "mistral3": (
            "Mistral3ForConditionalGeneration",
            "Mistral3Config",
            {
                "text_config": {"model_type": "mistral", **_WIDE_HEADS},
                "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 32},
                "image_token_index": IMAGE_TOKEN,
            },
        ),
        "mixtral": (
            "MixtralForCausalLM",
            "MixtralConfig",
            {**_WIDE_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _WIDE_HEADS),
        "qwen2_moe": (
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            {
                **_DECODER,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 256,
                "shared_expert_intermediate_size": 256,
            },
        ),
        "qwen3_moe": (
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            {
                **_WIDE_HEADS,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 256,
                "norm_topk_prob": True,
            },
        ),
        "qwen2_vl": (
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            {
                "text_config": dict(_QWEN_VL_TEXT),
                "vision_config": {
                    "depth": 1,
                    "embed_dim": 64,
                    "hidden_size": 128,
                    "num_heads": 2,
                    "patch_size": 16,
                },
                **_QWEN_VL_TOKENS,
            },
        ),
        "qwen2_5_vl": (
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            {
                "text_config": dict(_QWEN_VL_TEXT),
                "vision_config": {
                    "depth": 1,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "out_hidden_size": 128,
                    "num_heads": 2,
                    "patch_size": 16,
                    "fullatt_block_indexes": [0],
                },
                **_QWEN_VL_TOKENS,
            },
        ),
        "phi": ("PhiForCausalLM", "PhiConfig", {**_ENCODER, "num_key_value_heads": 4}),
        "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
        "phi4": ("Phi3ForCausalLM", "Phi3Config", {**_DECODER, "partial_rotary_factor": 0.75}),
        "phimoe": (
            "PhimoeForCausalLM",
            "PhimoeConfig",
            {
                **_DECODER,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "attention_bias": True,
                "lm_head_bias": True,
            },
        ),
        "gemma": ("GemmaForCausalLM", "GemmaConfig", _WIDE_HEADS),
        "gemma2": (
            "Gemma2ForCausalLM",
            "Gemma2Config",
            {**_WIDE_HEADS, "query_pre_attn_scalar": 32, "sliding_window": 64},
        ),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA3_TEXT),
        "gemma3_vision": (
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            {
                "text_config": dict(_GEMMA3_TEXT),
                "vision_config": dict(_VISION),
                "mm_tokens_per_image": 4,
                "image_token_index": IMAGE_TOKEN,
                "boi_token_index": IMAGE_TOKEN - 1,
                "eoi_token_index": IMAGE_TOKEN - 2,
            },
        ),
        "deepseek_v3": (
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            {
                **_ENCODER,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 128,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "q_lora_rank": 128,
                "kv_lora_rank": 128,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 16,
                "v_head_dim": 32,
            },
        ),
        "gpt_oss": (
            "GptOssForCausalLM",
            "GptOssConfig",
            {
                **_WIDE_HEADS,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 64,
            },
        ),
        "nemotron": ("NemotronForCausalLM", "NemotronConfig", _WIDE_HEADS),
        "exaone4": (
            "Exaone4ForCausalLM",
            "Exaone4Config",
            {**_WIDE_HEADS, "sliding_window": 64, "sliding_window_pattern": 2},
        ),
        "glm4": ("Glm4ForCausalLM", "Glm4Config", _WIDE_HEADS),
        "falcon": (
            "FalconForCausalLM",
            "FalconConfig",
            {
                **_TOKENS,
                "hidden_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "ffn_hidden_size": 256,
                "max_position_embeddings": MAXIMUM_POSITIONS,
            },
        ),
        "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _DECODER),
        "gpt2": (
            "GPT2LMHeadModel",
            "GPT2Config",
            {
                **_TOKENS,
                "n_positions": MAXIMUM_POSITIONS,
                "n_embd": 128,
                "n_layer": 2,
                "n_head": 4,
                "n_inner": 256,
            },
        ),
        "gptj": (
            "GPTJForCausalLM",
            "GPTJConfig",
            {
                **_TOKENS,
                "n_positions": MAXIMUM_POSITIONS,
                "n_embd": 128,
                "n_layer": 2,
                "n_head": 4,
                "n_inner": 256,
                "rotary_dim": 16,
            },
        ),
        "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _ENCODER),
        "opt": (
            "OPTForCausalLM",
            "OPTConfig",
            {
                **_TOKENS,
                "hidden_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "ffn_dim": 256,
                "word_embed_proj_dim": 128,
                "max_position_embeddings": MAXIMUM_POSITIONS,
            },
        ),
        "bloom": (
            "BloomForCausalLM",
            "BloomConfig",
            {**_TOKENS, "hidden_size": 128, "n_layer": 2, "n_head": 4},
        ),
        "mpt": (
            "MptForCausalLM",
            "MptConfig",
            {
                **_TOKENS,
                "d_model": 128,
                "n_layers": 2,
                "n_heads": 4,
                "expansion_ratio": 2,
                "max_seq_len": MAXIMUM_POSITIONS,
            },
        ),
        "stablelm": ("StableLmForCausalLM", "StableLmConfig", _DECODER),
        "mamba": (
            "MambaForCausalLM",
            "MambaConfig",
            {
                **_TOKENS,
                "hidden_size": 128,
                "num_hidden_layers": 2,
                "state_size": 8,
                "time_step_rank": 16,
            },
        ),
        "bert": ("BertForMaskedLM", "BertConfig", _ENCODER),
        "roberta": ("RobertaForMaskedLM", "RobertaConfig", _ENCODER),
        "t5": (
            "T5ForConditionalGeneration",
            "T5Config",
            {**T5, "feed_forward_proj": "relu", "tie_word_embeddings": True},
        ),
        "flan_t5": (
            "T5ForConditionalGeneration",
            "T5Config",
            {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ),
        "bart": (
            "BartForConditionalGeneration",
            "BartConfig",
            {**_BART, "max_position_embeddings": MAXIMUM_POSITIONS},
        ),
        "whisper": (
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {
                **_BART,
                "num_mel_bins": 16,
                "max_source_positions": 32,
                "max_target_positions": 64,
            },
        ),
        "llava": (
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {
                "text_config": {"model_type": "llama", **_DECODER},
                "vision_config": {"model_type": "clip_vision_model", **_VISION},
                "image_token_index": IMAGE_TOKEN,
            },
        ),
        "llava_next": (
            "LlavaNextForConditionalGeneration",
            "LlavaNextConfig",
            {
                "text_config": {"model_type": "mistral", **_WIDE_HEADS},
                "vision_config": {"model_type": "clip_vision_model", **_VISION},
                "image_token_index": IMAGE_TOKEN,
                "image_grid_pinpoints": [[32, 32]],
            },
        ),
        "mllama": (
            "MllamaForConditionalGeneration",
            "MllamaConfig",
            {
                "text_config": {
                    **_DECODER,
                    "cross_attention_layers": [1],
                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                },
                "vision_config": {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 1,
                    "num_global_layers": 1,
                    "attention_heads": 2,
                    "image_size": 32,
                    "patch_size": 16,
                    "vision_output_dim": 128,
                    "intermediate_layers_indices": [0],
                    "supported_aspect_ratios": [[1, 1]],
                    "max_num_tiles": 1,
                },
                "image_token_index": IMAGE_TOKEN - 1,
            },
        ),
        "nemotron_nas": (
            "ManyShapesForCausalLM",
            "ManyShapesConfig",
            {
                **_DECODER,
                "num_hidden_layers": 4,
                "block_configs": [
                    {"key_value_heads": 2, "intermediate_size": 256},
                    {"key_value_heads": None, "intermediate_size": 384},
                    {"key_value_heads": 4, "intermediate_size": 128},
                    {"key_value_heads": 1, "intermediate_size": None},
                ],
            },
        ),
    }
)

REMOTE_CODE: Mapping[str, str] = MappingProxyType({"nemotron_nas": "layers_of_many_shapes"})
"""Families whose classes transformers lacks -> the module of `remote_code` in their folders."""
