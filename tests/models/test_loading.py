import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoq.errors import ModelError
from autoq.models import (
    check_finite,
    discover,
    fingerprint_of_module,
    forward_logits,
    load_model,
    load_tokenizer,
    model_fingerprint,
)
from autoq.models.folder import INDEX_NAME
from autoq.testing.tiny_models import (
    TINY_ARCHITECTURES,
    make_byte_tokenizer,
    make_tiny_model,
    write_tiny_model,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(name, root / name) for name in TINY_ARCHITECTURES}


@pytest.fixture
def llama(folders, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folders["llama"], tmp_path / "llama")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "drop"}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_loaded_model_equals_the_saved_one(folders, name):
    loaded, made = load_model(folders[name]), make_tiny_model(name)
    ids = torch.randint(4, 260, (2, 16), generator=torch.Generator().manual_seed(1))
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(forward_logits(loaded, ids), forward_logits(made, ids))


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_tokenizer_survives_the_folder(folders, name):
    text = "naïve text, 12 + 30 = 42\n"
    expected = make_byte_tokenizer()(text)["input_ids"]
    assert load_tokenizer(folders[name])(text)["input_ids"] == expected
    assert max(expected) < 288


def test_loading_prints_nothing_and_restores_verbosity(folders, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity()
    load_model(folders["mixtral"])
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before
    assert logging.is_progress_bar_enabled()


def test_experts_run_where_hooks_see_them(folders):
    assert load_model(folders["mixtral"]).config._experts_implementation == "eager"


def test_dtype_can_be_chosen(folders):
    model = load_model(folders["llama"], dtype="float32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_class_follows_from_model_type_without_architectures(llama):
    edit_config(llama, architectures="drop")
    assert type(load_model(llama)).__name__ == "LlamaForCausalLM"


def test_sharded_folder_loads(folders, tmp_path):
    model = load_model(folders["llama"])
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / INDEX_NAME).is_file()
    assert fingerprint_of_module(load_model(tmp_path)) == fingerprint_of_module(model)


def test_missing_folder(tmp_path):
    with pytest.raises(ModelError, match=r"no-such does not exist; check the path"):
        load_model(tmp_path / "no-such")


def test_file_instead_of_folder(llama):
    with pytest.raises(ModelError, match=r"config\.json is a file; give the folder"):
        load_model(llama / "config.json")


def test_no_config(llama):
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has a config\.json, and .* has none"):
        load_model(llama)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", r"config\.json must be JSON, and is not", id="broken"),
        pytest.param("[1]", r"must hold a JSON object, and holds a list", id="list"),
        pytest.param("[" * 100_000, r"config\.json must be JSON, and is not", id="deep"),
    ],
)
def test_bad_config(llama, text, message):
    (llama / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_model(llama)


def test_config_without_weights(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"config\.json without weights"):
        load_model(llama)


def test_pickled_weights_only(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which is not safetensors"):
        load_model(llama)


def test_unindexed_shards(llama):
    (llama / "model.safetensors").rename(llama / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ModelError, match=r"only model-00001-of-00002\.safetensors; fetch the index"
    ):
        load_model(llama)


@pytest.mark.parametrize("kept", [4, 100, -1], ids=["in_length", "in_header", "in_data"])
def test_truncated_shard(llama, kept):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated.*fetch it again"):
        load_model(llama)


def test_garbage_instead_of_safetensors(llama):
    (llama / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops")
    with pytest.raises(ModelError, match=r"is not safetensors: its header is no JSON"):
        load_model(llama)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        pytest.param(
            "gone.safetensors", r"names gone\.safetensors, and that file is missing", id="gone"
        ),
        pytest.param("x" * 300, r"names xxx.* and that file is missing", id="too_long"),
        pytest.param("../model.safetensors", r"must name files of its own folder", id="outside"),
    ],
)
def test_index_names_a_bad_shard(llama, shard, message):
    (llama / INDEX_NAME).write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(ModelError, match=message):
        load_model(llama)


def test_unknown_architecture(llama):
    edit_config(llama, architectures=["NobodyForCausalLM"])
    with pytest.raises(ModelError, match=r"'NobodyForCausalLM' .* is not known: transformers 5"):
        load_model(llama)


def test_architecture_with_code_of_its_own_needs_consent(llama):
    edit_config(
        llama,
        architectures=["NobodyForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_nobody.NobodyForCausalLM"},
    )
    (llama / "modeling_nobody.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"read it, then pass trust_remote_code"):
        load_model(llama)


def test_unknown_model_type_without_architectures(llama):
    edit_config(llama, architectures="drop", model_type="nobody")
    with pytest.raises(ModelError, match=r"from its model_type 'nobody' no language model follows"):
        load_model(llama)


def test_missing_tensor(llama):
    edit_weights(llama, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ModelError, match=r"lacks weights .*: model\.layers\.1\.mlp\.up_proj\.weight;"
    ):
        load_model(llama)


def test_unexpected_tensor(llama):
    edit_weights(llama, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ModelError, match=r"does not know: extra;"):
        load_model(llama)


def test_original_bert_carries_heads_that_are_left_out(folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "bert")
    extra = ("bert.pooler.dense.weight", "cls.seq_relationship.bias")
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(1) for name in extra}))
    assert type(load_model(folder)).__name__ == "BertForMaskedLM"


def test_tensor_of_another_shape(llama):
    edit_config(llama, vocab_size=300)
    with pytest.raises(ModelError, match=r"another shape .*: lm_head\.weight and 1 more;"):
        load_model(llama)


@pytest.mark.parametrize("how", ["config", "file"])
def test_quantised_already(llama, how):
    if how == "config":
        edit_config(llama, quantization_config={"quant_method": "compressed-tensors"})
    else:
        (llama / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"must not be quantised, and .* is already"):
        load_model(llama)


def test_tokenizer_missing(llama):
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"needs the model's tokenizer, and .* has none"):
        load_tokenizer(llama)


def test_fingerprint_sees_one_changed_value(llama):
    before = model_fingerprint(llama)
    assert before == model_fingerprint(llama)
    path = llama / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert model_fingerprint(llama) != before


def test_fingerprint_does_not_depend_on_the_path(llama, tmp_path):
    before = model_fingerprint(llama)
    assert model_fingerprint(llama.rename(tmp_path / "elsewhere")) == before


def test_fingerprint_of_module_sees_weights_and_configuration():
    model = make_tiny_model("llama")
    before = fingerprint_of_module(model)
    assert before == fingerprint_of_module(make_tiny_model("llama"))
    assert before != fingerprint_of_module(make_tiny_model("llama", seed=1))
    model.config.rms_norm_eps *= 2
    assert before != fingerprint_of_module(model)


@pytest.mark.parametrize(
    ("architecture", "module", "parameter", "index", "named"),
    [
        (
            "llama",
            "model.layers.1.mlp.up_proj",
            "weight",
            (0, 5),
            r"model\.layers\.1\.mlp\.up_proj",
        ),
        ("gpt2", "transformer.h.0.mlp.c_fc", "weight", (0, 5), r"transformer\.h\.0\.mlp\.c_fc"),
        ("mixtral", "model.layers.0.mlp.experts", "down_proj", (2, 0, 0), r"experts\.2\.down_proj"),
        ("llama", "model.norm", "weight", (3,), r"model\.norm\.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_broken_value_is_named(architecture, module, parameter, index, named, value):
    model = make_tiny_model(architecture)
    slots = discover(model).slots
    check_finite(model, slots)
    with torch.no_grad():
        getattr(model.get_submodule(module), parameter)[index] = value
    with pytest.raises(ModelError, match=rf"finite, and .*{named} has 1 NaN or infinite"):
        check_finite(model, slots)


def test_model_packages_import_without_transformers():
    import subprocess

    probe = "import sys, autoq.models, autoq.data; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)
