"""Folding: found where a norm feeds nothing but the layers of one scale, and there exact."""

import pytest
import torch
from torch import nn

from autoq.calibration.folding import find_folds
from autoq.models import discover, forward_logits, slot_weight
from autoq.testing.tiny_models import make_tiny_model

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA_LIKE = {"input_layernorm": ATTENTION, "post_attention_layernorm": GATE_UP}
OPT = {
    "self_attn_layer_norm": ATTENTION,
    "final_layer_norm": ("fc1",),
}
T5_ENCODER = {
    "layer.0.layer_norm": tuple(f"layer.0.SelfAttention.{name}" for name in "qkv"),
    "layer.1.layer_norm": ("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
}
T5_DECODER = {
    "layer.0.layer_norm": tuple(f"layer.0.SelfAttention.{name}" for name in "qkv"),
    "layer.1.layer_norm": ("layer.1.EncDecAttention.q",),
    "layer.2.layer_norm": ("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"),
}


def in_layers(prefix, norms):
    return {
        f"{prefix}.{layer}.{slot}": f"{prefix}.{layer}.{norm}"
        for layer in (0, 1)
        for norm, slots in norms.items()
        for slot in slots
    }


LLAMA_FOLDS = in_layers("model.layers", LLAMA_LIKE)
MIXTURE_FOLDS = in_layers("model.layers", {"input_layernorm": ATTENTION})
FOLDS = {
    "llama": LLAMA_FOLDS,
    "qwen2": LLAMA_FOLDS,
    "qwen3": LLAMA_FOLDS,
    "mistral": LLAMA_FOLDS,
    "phi3": in_layers(
        "model.layers",
        {
            "input_layernorm": ("self_attn.qkv_proj",),
            "post_attention_layernorm": ("mlp.gate_up_proj",),
        },
    ),
    "gpt2": in_layers("transformer.h", {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}),
    "opt": in_layers("model.decoder.layers", OPT),
    # The second norm feeds the router as well as the experts.
    "mixtral": MIXTURE_FOLDS,
    "qwen3_moe": MIXTURE_FOLDS,
    # Its norms multiply by 1 + weight.
    "gemma3": {},
    # Every norm feeds a residual, but the last: only the head's transform reads that one.
    "bert": {"cls.predictions.transform.dense": "bert.encoder.layer.1.output.LayerNorm"},
    # The encoder's last norm feeds the cross-attention of every decoder layer.
    "t5": in_layers("encoder.block", T5_ENCODER) | in_layers("decoder.block", T5_DECODER),
}
every_architecture = pytest.mark.parametrize("name", FOLDS)


def token_ids():
    return torch.randint(4, 260, (1, 6), generator=torch.Generator().manual_seed(0))


def folds_of(model, ids=None):
    ids = token_ids() if ids is None else ids
    return find_folds(model, discover(model), lambda: forward_logits(model, ids))


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folds_are_found_where_they_are(name, dtype):
    assert folds_of(make_tiny_model(name, dtype=dtype)) == FOLDS[name]


@pytest.mark.parametrize("name", [name for name in FOLDS if FOLDS[name]])
@torch.no_grad()
def test_a_real_fold_leaves_the_logits_equal(name):
    model = make_tiny_model(name, dtype=torch.float32)
    slots = discover(model).slots
    expected = forward_logits(model, token_ids())
    scales = {}
    generator = torch.Generator().manual_seed(1)
    for slot, path in folds_of(model).items():
        norm = model.get_submodule(path)
        if path not in scales:
            exponents = torch.randint(-3, 4, norm.weight.shape, generator=generator)
            scales[path] = torch.exp2(exponents.float())
            norm.weight.mul_(scales[path])
            if getattr(norm, "bias", None) is not None:
                norm.bias.mul_(scales[path])
        slot_weight(model, slots[slot]).div_(scales[path])
    folded = forward_logits(model, token_ids())
    torch.testing.assert_close(folded, expected, rtol=1e-5, atol=1e-5)


@every_architecture
def test_the_model_is_restored_to_the_bit(name):
    model = make_tiny_model(name, dtype=torch.bfloat16)
    before = {key: values.clone() for key, values in model.state_dict().items()}
    folds_of(model)
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("failing_run", [1, 2, 3])
def test_the_model_is_restored_when_a_run_fails(failing_run):
    model = make_tiny_model("gemma3", dtype=torch.float32)
    before = {key: values.clone() for key, values in model.state_dict().items()}
    runs = []

    def run():
        runs.append(1)
        if len(runs) == failing_run:
            raise RuntimeError("out of luck")
        return forward_logits(model, token_ids())

    with pytest.raises(RuntimeError, match="out of luck"):
        find_folds(model, discover(model), run)
    assert all(torch.equal(values, before[key]) for key, values in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_few_runs_where_everything_folds():
    model = make_tiny_model("llama", dtype=torch.float32)
    runs = []

    def run():
        runs.append(1)
        return forward_logits(model, token_ids())

    find_folds(model, discover(model), run)
    assert len(runs) == 3


class Mixer(nn.Module):
    """A norm in front of linears, read as `forward_of` says."""

    def __init__(self, forward_of):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        for name in ("q_proj", "k_proj", "v_proj", "other"):
            setattr(self, name, nn.Linear(8, 8))
        self._forward_of = forward_of

    def forward(self, x):
        return self._forward_of(self, self.norm(x), x)


def folds_of_mixer(forward_of):
    mixer = Mixer(forward_of)
    x = torch.randn(3, 8)
    return find_folds(mixer, discover(mixer), lambda: mixer(x))


def qkv(module, x, y, z):
    return module.q_proj(x) * module.k_proj(y) + module.v_proj(z)


QKV = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "norm")


@pytest.mark.parametrize(
    ("forward_of", "folds"),
    [
        pytest.param(lambda m, n, x: qkv(m, n, n, n) + m.other(x), QKV, id="whole-set"),
        pytest.param(lambda m, n, x: qkv(m, n, x, x) + m.other(x), {}, id="part-of-the-set"),
        pytest.param(lambda m, n, x: qkv(m, n, n, n) + m.other(n), {}, id="two-sets"),
        pytest.param(lambda m, n, x: qkv(m, n, n, n) + n + m.other(x), {}, id="residual"),
        pytest.param(lambda m, n, x: qkv(m, n, n, n.abs()) + m.other(x), {}, id="changed-copy"),
        pytest.param(lambda m, n, x: qkv(m, x, x, x) + m.other(n), {"other": "norm"}, id="alone"),
    ],
)
def test_a_norm_must_feed_exactly_the_layers_of_one_scale(forward_of, folds):
    assert folds_of_mixer(forward_of) == folds


def test_a_run_that_gives_nan_folds_nothing():
    model = make_tiny_model("llama", dtype=torch.float32)
    model.lm_head.weight.data[0, 0] = torch.nan
    assert folds_of(model) == {}
