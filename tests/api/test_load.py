"""`autoq.load` and `autoq.api.generate`: what they take, give and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autoq
from autoq.api import generate
from autoq.errors import ExportError, InputError, ModelError
from autoq.layers.packed import PackedLinear
from autoq.testing.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    """A searched llama, exported."""
    folder = tmp_path_factory.mktemp("load")
    autoq.search(
        llama_folder,
        formats=("fp8", "nvfp4"),
        effective_bits=6.0,
        calibration_sequences=4,
        sequence_length=32,
        batch_size=2,
        measure=False,
        store=f"sqlite:///{folder / 'studies.db'}",
        export=folder / "out",
    )
    return folder / "out"


def test_load_gives_a_transformers_model_of_packed_layers(checkpoint: Path) -> None:
    from transformers import LlamaForCausalLM

    model = autoq.load(checkpoint)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_dtype_has_a_name_or_is_torchs(checkpoint: Path, dtype: str | torch.dtype) -> None:
    model = autoq.load(
        str(checkpoint), device="auto" if not torch.cuda.is_available() else "cpu", dtype=dtype
    )
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got int8"),
        ({"dtype": torch.float64}, "dtype must be one of .*, got torch.float64"),
        ({"device": "cuda:99"}, "no device 'cuda:99'"),
        ({"device": "nowhere"}, "no device 'nowhere'"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        autoq.load(tmp_path / "missing", **options)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        autoq.load(tmp_path / "missing")
    with pytest.raises(ExportError, match=r"has a config\.json, and .* has none"):
        autoq.load(tmp_path)


def test_generate_continues_the_prompt(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    found = generate(checkpoint, "abc", max_new_tokens=6, device="cpu")
    model, tokenizer = autoq.load(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("abc", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=6, do_sample=False)[0]
    assert found["text"] == tokenizer.decode(output, skip_special_tokens=True)
    assert found["text"].startswith("abc")
    assert found["new_tokens"] == len(output) - ids["input_ids"].shape[1] <= 6
    assert found["weight_bytes"] == model.get_memory_footprint()
    assert (found["prompt"], found["device"]) == ("abc", "cpu")


def test_encoder_decoders_answer_without_the_prompt(tmp_path: Path) -> None:
    found = generate(write_tiny_model("t5", tmp_path / "t5"), "abc", max_new_tokens=4, device="cpu")
    assert not found["text"].startswith("abc")
    assert found["new_tokens"] <= 4


def test_what_cannot_generate_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prompt must hold text"):
        generate(checkpoint, "", device="cpu")
    with pytest.raises(InputError, match="3 tokens and 254 new ones must fit the model's 256"):
        generate(checkpoint, "abc", max_new_tokens=254, device="cpu")
    bert = write_tiny_model("bert", tmp_path / "bert")
    with pytest.raises(InputError, match="is a BertForMaskedLM, which does not generate text"):
        generate(bert, "abc", device="cpu")
    (bert / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="needs the model's tokenizer"):
        generate(bert, "abc", device="cpu")
