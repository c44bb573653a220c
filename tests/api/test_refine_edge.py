"""What cannot be minimised or kept is refused before a model is loaded, scored, or a plan stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import autoq
from autoq.api import search_setup, task
from autoq.api.refinement.edge import check_aim
from autoq.api.refinement.refining import RefineOptions
from autoq.errors import AutoqError, DataError, InputError, UnknownNameError
from autoq.testing.tiny_models import make_byte_tokenizer, make_tiny_model, write_tiny_model
from tests.api.refinements import SMALL

REFUSED = [
    ({"objective": "kl +"}, "must be arithmetic over metrics"),
    ({"objective": "kl ** 2"}, "leave that out"),
    ({"objective": "kl + 1/0"}, "never has a value, because 1 / 0"),
    ({"objective": "kll"}, r"'kll' is no metric and no evaluation task"),
    ({"objective": "kl + perplexityy"}, "did you mean perplexity"),
    ({"objective": "autoq_choises"}, "is no metric and no evaluation task"),
    ({"objective": "autoq_choices.accc"}, r"did you mean autoq_choices\.acc\?"),
    ({"objective": "top1"}, "better the higher it is; write 1 - top1"),
    ({"objective": "autoq_choices"}, "better the higher it is; write 1 - autoq_choices"),
    ({"objective": "kl", "constraints": ("ppl>1",)}, "a constraint must be"),
    ({"constraints": ("ppl<=nan",)}, "a constraint must be"),
    ({"constraints": ("pppl<=1.1x",)}, "is no metric and no evaluation task"),
    ({"constraints": ("missing.yaml>=0.9x",)}, "does not exist"),
    ({"objective": "kl + weight_bytes"}, "packed_cost needs weights that are packed"),
    ({"objective": "kl + packed_cost"}, "name one of seconds_per_step"),
    ({"constraints": ("cosine_similarity>=0.9",)}, "needs hidden states as its output"),
]


class Loaded(Exception):
    """The model was loaded."""


@pytest.fixture
def no_loading(monkeypatch):
    def load(*_):
        raise Loaded

    for module in (search_setup, task):
        monkeypatch.setattr(module, "load", load)


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_search_refuses_at_once_what_its_refinement_cannot_do(
    llama_folder, quick, tmp_path, no_loading, options, message
):
    with pytest.raises(InputError, match=message):
        autoq.search(llama_folder, **quick, refine=2, refine_options=options)
    assert not (tmp_path / "studies.db").exists()


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_refinement_refuses_before_a_plan_is_solved_for_another_budget(
    study, no_loading, options, message
):
    with pytest.raises(InputError, match=message):
        study.refine(5.0, **{**SMALL, **options})
    assert [plan.label for plan in study.plans()] == ["6 bits"]


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "kl + 0.1*log(ppl) - top1"},
        {"objective": "1 - autoq_choices", "constraints": ("autoq_text<=1.1x", "top1>=0.9")},
    ],
)
def test_what_can_be_done_goes_on_to_loading(llama_folder, quick, no_loading, options):
    with pytest.raises(Loaded):
        autoq.search(llama_folder, **quick, refine=2, refine_options=options)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("ppl", "perplexity needs an output head and to predict the next token"),
        ("1 - autoq_choices", "evaluation tasks need a model that predicts the next token"),
    ],
)
def test_metrics_that_an_architecture_lacks_are_refused_without_its_weights(
    tmp_path, quick, no_loading, objective, message
):
    from transformers import AutoModel

    folder = write_tiny_model("llama", tmp_path / "llama")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(InputError, match=message):
        autoq.search(folder, **quick, refine=2, refine_options={"objective": objective})


def test_a_task_whose_data_cannot_be_had_is_refused_before_loading(
    llama_folder, quick, no_loading, monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    options = {"constraints": ("arc_easy>=0.99x",)}
    with pytest.raises(DataError, match="arc_easy needs the dataset allenai/ai2_arc"):
        autoq.search(llama_folder, **quick, refine=2, refine_options=options)


@pytest.mark.parametrize("objective", ["kl", "ppl"])
def test_a_model_in_memory_is_asked_itself(objective):
    model = make_tiny_model("bert")
    aim = RefineOptions(objective=objective).aim
    if objective == "kl":
        check_aim(aim, model, trust_remote_code=False)
        return
    with pytest.raises(InputError, match="to predict the next token"):
        check_aim(aim, model, trust_remote_code=False)


def test_a_folder_whose_model_cannot_be_built_is_left_to_loading(tmp_path):
    """Its refusal says more, and some models are built by their weights alone."""
    config = {"architectures": ["NoSuchModel"], "model_type": "none"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    make_byte_tokenizer().save_pretrained(tmp_path)
    check_aim(RefineOptions(objective="ppl").aim, tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    ("store", "workers", "message"),
    [
        ("sqlite://", 2, "this one is in memory"),
        (None, 0, "workers must be >= 1, got 0"),
        ("nonsense", 2, "nonsense"),
    ],
)
def test_workers_that_cannot_share_are_refused_before_loading(
    llama_folder, quick, monkeypatch, store, workers, message
):
    def load(*_):
        raise UnknownNameError("nonsense")  # what opens the store comes after loading

    monkeypatch.setattr(search_setup, "load", load)
    if store is not None:
        quick["store"] = store
    with pytest.raises(AutoqError, match=message):
        autoq.search(llama_folder, **quick, refine=2, workers=workers)


def test_a_model_in_memory_is_refined_by_one_worker(quick):
    with pytest.raises(InputError, match="refine it with one worker"):
        autoq.search(make_tiny_model("llama"), **quick, refine=2, workers=2)


def test_task_files_are_named_from_any_folder(llama_folder, quick, no_loading, tmp_path):
    """A path in quotes is a name."""
    missing = str(Path(tmp_path) / "my-task.yaml")
    with pytest.raises(InputError, match=r"my-task\.yaml does not exist"):
        autoq.search(llama_folder, **quick, refine=2, refine_options={"objective": f"'{missing}'"})
