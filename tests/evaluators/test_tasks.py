"""lm-eval's tasks on models in memory, for real: with the bundled model and small data files."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoq.bundled import harness_tasks, model_path, tasks_path
from autoq.errors import DataError, EvaluationError, InputError, UnknownNameError
from autoq.evaluators import measure_metrics
from autoq.evaluators._task_files import find_task
from autoq.evaluators.harness_model import HarnessModel
from autoq.evaluators.metrics import wanted
from autoq.evaluators.protocol import Subject
from autoq.evaluators.tasks import run_tasks
from autoq.testing.tiny_models import make_byte_tokenizer, make_tiny_model

CHANCE = 0.3125  # three kinds of question have four choices, one has two

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["a", "b"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.5}
"""


@pytest.fixture(scope="module")
def bundled():
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    return Subject(model=model, tokenizer=AutoTokenizer.from_pretrained(model_path()))


@pytest.fixture(scope="module")
def tiny():
    model = make_tiny_model("llama", dtype=torch.float32)
    return Subject(model=model, tokenizer=make_byte_tokenizer())


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """A task file beside its data, with neither a network nor a cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = [{"text": f"{n} then", "label": n % 2} for n in range(6)]
    (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "letters.yaml").write_text(TASK)
    return tmp_path / "letters.yaml"


def test_the_bundled_model_answers_far_above_chance(bundled):
    results = run_tasks(bundled, ["autoq_choices"])
    assert results.failures == []
    (run,) = results.runs
    accuracy = run.estimates["autoq_choices.acc"]
    assert run.estimates["autoq_choices"] == accuracy
    # 200 questions: five standard errors are 0.17
    assert accuracy.low > CHANCE + 0.17
    assert accuracy.value == pytest.approx(sum(accuracy.per_sequence) / 200)
    assert set(accuracy.per_sequence) == {0.0, 1.0}
    assert run.versions == {"autoq_choices": 1.0}
    assert run.examples == {"autoq_choices": 200}
    assert run.higher_is_better == {"autoq_choices.acc": True}
    assert run.configurations["autoq_choices"]["output_type"] == "multiple_choice"
    json.dumps(run.configurations)


def test_figures_are_those_of_the_harness_own_model(bundled):
    pytest.importorskip("accelerate")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["autoq_choices", "autoq_text"]
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=bundled.model, tokenizer=bundled.tokenizer, batch_size=8),
        tasks=[str(tasks_path() / f"{name}.yaml") for name in names],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        limit=24,
    )["results"]
    results = run_tasks(bundled, names, limit=24)
    ours = {name: value for run in results.runs for name, value in run.estimates.items()}
    for name, metric in [
        ("autoq_choices", "acc"),
        ("autoq_text", "byte_perplexity"),
        ("autoq_text", "word_perplexity"),
        ("autoq_text", "bits_per_byte"),
    ]:
        # float32 products depend on the batch; log-likelihoods differ by some 1e-7 of themselves
        expected = pytest.approx(theirs[name][f"{metric},none"], rel=1e-6)
        assert ours[f"{name}.{metric}"].value == expected
        low, high = ours[f"{name}.{metric}"].low, ours[f"{name}.{metric}"].high
        assert low < ours[f"{name}.{metric}"].value < high
    assert ours["autoq_text"] == ours["autoq_text.byte_perplexity"]  # the first that is named


def test_continuations_are_those_of_the_model_alone(bundled):
    from lm_eval.api.instance import Instance

    prompts = ["the code of the ", "question : what is 9*4 ? answer :", "copy a b c : a"]
    options = {"until": [" .", "\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, dict(options)), 0) for prompt in prompts]
    requests[1].arguments[1]["max_gen_toks"] = 3  # another batch
    for batch_size in (1, "auto"):
        harness = HarnessModel(
            bundled.model, bundled.tokenizer, batch_size=batch_size, show_progress=False
        )
        texts = harness.generate_until(requests)
        for prompt, text, request in zip(prompts, texts, requests, strict=True):
            ids = bundled.tokenizer(prompt, return_tensors="pt")["input_ids"]
            output = bundled.model.generate(
                ids, max_new_tokens=request.args[1]["max_gen_toks"], do_sample=False
            )
            alone = bundled.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert text == alone.split(" .")[0].split("\n")[0]
    assert texts[1].strip() == "36"


def test_every_size_of_batch_gives_the_same_figures(bundled):
    wholes = []
    for batch_size in (1, 7, "auto"):
        (run,) = run_tasks(bundled, ["autoq_text"], limit=5, batch_size=batch_size).runs
        wholes.append(run.estimates["autoq_text.byte_perplexity"].value)
    # float32 products depend on the batch
    assert wholes == pytest.approx([wholes[0]] * 3, rel=1e-6)


def test_batches_are_halved_where_memory_does_not_suffice(tiny, monkeypatch):
    harness = HarnessModel(tiny.model, tiny.tokenizer, show_progress=False)
    requests = [("", [3, 4, 5], [6 + n]) for n in range(4)] + [("", [9, 8], [7])]
    expected = harness._loglikelihood_tokens(requests)
    sizes = []
    whole = HarnessModel._log_probabilities

    def with_room_for_one(self, rows):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("no room")
        return whole(self, rows)

    monkeypatch.setattr(HarnessModel, "_log_probabilities", with_room_for_one)
    found = harness._loglikelihood_tokens(requests)
    assert sizes[0] == 2  # four choices after one question share a row
    assert sizes[-2:] == [1, 1]
    for (value, greedy), (wanted_value, wanted_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted_value, abs=1e-4)  # float32, another batch
        assert greedy == wanted_greedy


def test_log_likelihoods_by_hand(tiny):
    harness = HarnessModel(tiny.model, tiny.tokenizer, show_progress=False)
    context, continuation = [5, 6, 7], [8, 9]
    with torch.no_grad():
        logits = tiny.model(torch.tensor([[*context, *continuation]])).logits[0].double()
    log_probabilities = logits.log_softmax(-1)
    expected = float(log_probabilities[2, 8] + log_probabilities[3, 9])
    greedy = [int(logits[2].argmax()), 9]
    ((value, is_greedy),) = harness._loglikelihood_tokens([("", context, continuation)])
    assert value == pytest.approx(expected, rel=1e-5)
    assert is_greedy == (greedy == continuation and int(logits[3].argmax()) == 9)
    ((_, is_greedy),) = harness._loglikelihood_tokens([("", context, greedy[:1])])
    assert is_greedy


def test_a_task_file_finds_its_data_beside_it(tiny, letters):
    (run,) = run_tasks(tiny, [str(letters)], limit=4).runs
    assert run.name == str(letters)
    assert run.estimates[str(letters)] == run.estimates["letters"]
    assert run.examples == {"letters": 4}
    assert run.versions == {"letters": 2.5}


def test_tasks_and_metrics_are_measured_by_name_together(tiny, letters):
    found = measure_metrics(tiny, None, [f"{letters}.acc"], limit=4)
    assert found["letters.acc"].value in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_a_task_that_fails_does_not_stop_the_others(tiny, letters, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text(TASK.replace("letters.jsonl", "absent.jsonl").replace("letters", "broken"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(TASK.replace("{{text}}", "{{text if label == 0 else text.nothing()}}"))
    results = run_tasks(tiny, [str(broken), str(wrong), str(letters)])
    assert [run.name for run in results.runs] == [str(letters)]
    assert [failure.name for failure in results.failures] == [str(broken), str(wrong)]
    assert "broken.yaml cannot be loaded: " in str(results.failures[0].error)
    assert "wrong.yaml cannot be run: 'str object' has no attribute 'nothing'" in str(
        results.failures[1].error
    )


def test_offline_a_task_of_the_hub_is_refused_at_once(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (failure,) = run_tasks(tiny, ["arc_easy"]).failures
    assert isinstance(failure.error, DataError)
    assert str(failure.error) == (
        "the task arc_easy needs the dataset allenai/ai2_arc:ARC-Easy, which is not in the cache "
        "of `datasets`, and HF_HUB_OFFLINE is set; fetch it where there is a network, or leave the "
        "task out"
    )


def test_unknown_names_are_refused_with_near_misses():
    with pytest.raises(UnknownNameError, match=r"'arc_eazy' is no metric.*arc_easy"):
        wanted(["arc_eazy"])
    with pytest.raises(UnknownNameError, match=r"'kl_medium'.*did you mean kl_median"):
        wanted(["kl_medium"])
    with pytest.raises(InputError, match=r"the task file no/such\.yaml does not exist"):
        wanted(["no/such.yaml"])


def test_names_are_sorted_into_metrics_and_tasks():
    found = wanted(["ppl", "autoq_choices.acc", "kl_p99", "autoq_text"])
    assert found.metrics == ("perplexity", "kl_p99")
    assert found.tasks == ("autoq_choices", "autoq_text")
    assert [evaluator.name for evaluator in found.evaluators] == ["perplexity", "kl_divergence"]


def test_tasks_groups_and_tags_of_the_harness_are_found():
    assert find_task("arc_easy").dataset == "allenai/ai2_arc:ARC-Easy"
    assert find_task("ai2_arc") is not None  # a tag, listed in its tasks' files
    assert find_task("hellaswag").path.name == "hellaswag.yaml"


def test_a_task_file_without_a_task_is_refused(tmp_path):
    (tmp_path / "other.yaml").write_text("name: value\n")
    with pytest.raises(InputError, match="must define an evaluation task"):
        find_task(str(tmp_path / "other.yaml"))
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(InputError, match=r"bad\.yaml cannot be read"):
        find_task(str(tmp_path / "bad.yaml"))


def test_a_model_whose_output_is_nan_is_refused(letters):
    model = make_tiny_model("llama", dtype=torch.float32)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(EvaluationError, match="holds NaN"):
        run_tasks(Subject(model=model, tokenizer=make_byte_tokenizer()), [str(letters)])


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_do_not_predict_next_tokens_are_refused(name):
    subject = Subject(model=make_tiny_model(name), tokenizer=make_byte_tokenizer())
    with pytest.raises(InputError, match="need a model that predicts the next token"):
        run_tasks(subject, ["autoq_choices"])


def test_without_the_harness_it_says_what_to_install(monkeypatch, tiny):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'autoq\[eval\]'"):
        run_tasks(tiny, ["autoq_choices"])


def test_the_shipped_data_are_what_the_language_makes(tmp_path):
    harness_tasks.write_data(tmp_path)
    for name in ("choices.jsonl", "texts.jsonl"):
        assert (tmp_path / name).read_bytes() == (tasks_path() / name).read_bytes()


def test_random_generators_are_as_before(tiny, letters):
    import random

    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    run_tasks(tiny, [str(letters)], limit=1)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
