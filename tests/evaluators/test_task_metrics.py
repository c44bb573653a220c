"""What a task's configuration says of its metrics, and groups of tasks in files of the user's."""

import json

import pytest
import torch

from autoq.errors import InputError, UnknownNameError
from autoq.evaluators import measure_metrics
from autoq.evaluators._task_files import find_task
from autoq.evaluators._task_metrics import check_is_single_number, task_metrics
from autoq.evaluators.metrics import is_better_higher, wanted
from autoq.evaluators.protocol import Subject
from autoq.evaluators.tasks import run_tasks
from autoq.testing.tiny_models import make_byte_tokenizer, make_tiny_model

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: label
{more}
"""
ACCURACY = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
FILTERED = """
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: loose, filter: [{function: take_first}]}
"""


@pytest.fixture(scope="module")
def tiny():
    model = make_tiny_model("llama", dtype=torch.float32)
    return Subject(model=model, tokenizer=make_byte_tokenizer())


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Writes a task file with its data beside it; there is neither a network nor a cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def write(name, more=ACCURACY, examples=6):
        rows = [{"text": f"{name} {n} then", "label": n % 2} for n in range(examples)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, more=more))
        return str(tmp_path / f"{name}.yaml")

    return write


@pytest.fixture
def group(tmp_path):
    def write(name="both", members=("one", "two"), more="aggregate_metric_list: [{metric: acc}]"):
        text = f"group: {name}\ntask: {json.dumps(list(members))}\n{more}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
        return str(tmp_path / f"{name}.yaml")

    return write


def names_of(path):
    return task_metrics(find_task(path)).names


def test_metrics_are_those_of_the_list_for_each_filter(task):
    assert names_of(task("plain")) == ("acc",)
    assert names_of(task("filtered", FILTERED)) == ("exact_match,strict", "exact_match,loose")
    assert names_of("autoq_text") == ("byte_perplexity", "word_perplexity", "bits_per_byte")


def test_without_a_list_they_are_those_of_the_harness(task):
    assert names_of(task("listless", "")) == ("acc", "acc_norm")


def test_what_the_configuration_names_is_what_the_harness_gives(task, tiny):
    """The two are read from different places, so they are compared once for real."""
    for path in (task("plain"), task("listless", "")):
        (run,) = run_tasks(tiny, [path], limit=2).runs
        given = {name for name in run.estimates if name.startswith(f"{path}.")}
        assert given == {f"{path}.{name}" for name in names_of(path)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("autoq_choices.accu", r"did you mean autoq_choices\.acc\?.*its metrics: autoq_choices"),
        ("arc_easy.acc_nrom", r"did you mean arc_easy\.acc_norm"),
        ("mmlu.f1", r"the task mmlu gives no metric 'f1'; its metrics: mmlu\.acc$"),
        ("ai2_arc.acc", "none of its own, name its tasks"),
    ],
)
def test_a_misspelt_metric_is_refused_before_the_task_is_run(name, message):
    with pytest.raises(UnknownNameError, match=message):
        wanted([name])


def test_a_metric_behind_a_filter_needs_the_filter(task):
    path = task("filtered", FILTERED)
    assert wanted([f"{path}.exact_match,loose"]).tasks == (path,)
    with pytest.raises(UnknownNameError, match=r"did you mean .*exact_match,(strict|loose)"):
        wanted([f"{path}.exact_match"])


def test_a_task_with_code_of_its_own_may_give_what_it_likes(task):
    path = task("own", ACCURACY + "\nprocess_results: !function utils.results")
    assert wanted([f"{path}.anything"]).tasks == (path,)


def test_what_is_minimised_has_one_number(group, task):
    task("one")
    task("two")
    check_is_single_number("arc_easy")
    check_is_single_number("mmlu")
    check_is_single_number(group())
    with pytest.raises(InputError, match="stands for several tasks"):
        check_is_single_number("ai2_arc")
    with pytest.raises(InputError, match="stands for several tasks"):
        check_is_single_number(group(more=""))


# Groups in files


def test_a_group_file_runs_the_tasks_beside_it(group, task, tiny):
    task("one", examples=4)
    task("two", examples=6)
    path = group(members=("one", "two.yaml"))
    (run,) = run_tasks(tiny, [path]).runs
    assert run.examples == {"one": 4, "two": 6}
    correct = [sum(run.estimates[f"{name}.acc"].per_sequence) for name in ("one", "two")]
    assert run.estimates[path].value == pytest.approx(sum(correct) / 10)
    assert run.estimates["both.acc"] == run.estimates[f"{path}.acc"] == run.estimates[path]
    assert measure_metrics(tiny, None, [f"{path}.acc"])[f"{path}.acc"] == run.estimates[path]


def test_a_group_may_name_groups_and_tasks_that_come_along(group, task, tiny):
    task("one", examples=4)
    group("inner", members=("one",))
    (run,) = run_tasks(tiny, [group("outer", members=("inner", "autoq_choices"))], limit=3).runs
    assert run.examples == {"one": 3, "autoq_choices": 3}
    assert {"inner.acc", "outer.acc"} <= run.estimates.keys()


@pytest.mark.parametrize(
    ("members", "more", "message"),
    [
        (("on",), "", r"lists 'on', which is no task"),
        (("absent.yaml",), "", r"absent\.yaml does not exist"),
        (("both",), "", r"holds itself by way of 'both'|lists 'both', which is no task"),
        (("both.yaml",), "", r"holds itself by way of 'both\.yaml'"),
        (("one", "one.yaml"), "", r"must hold every task once, and 'one\.yaml' brings one again"),
        (({"task": "one"},), "", r"by name or path.*give the task a file of its own"),
        ((), "", r"must list its tasks in 'task', got \[\]"),
        (("one",), "num_fewshot: 2", r"has 'num_fewshot'; move the tasks' settings"),
    ],
)
def test_groups_that_break_a_rule_are_refused(group, task, tiny, members, more, message):
    task("one")
    (failure,) = run_tasks(tiny, [group(members=members, more=more)]).failures
    assert isinstance(failure.error, InputError)
    with pytest.raises(InputError, match=message):
        raise failure.error


# Directions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kl", False),
        ("top1", True),
        ("perplexity", False),
        ("packed_cost", None),  # an evaluator of several metrics
        ("autoq_choices", True),
        ("autoq_choices.acc", True),
        ("autoq_text", False),  # its file says nothing, so lm-eval's own word for its metrics
        ("autoq_text.bits_per_byte", False),
        ("arc_easy.acc_norm", True),
        ("mmlu", True),  # a group
    ],
)
def test_the_better_direction_of_a_name_is_known(name, expected):
    assert is_better_higher(name) is expected


def test_a_tasks_file_decides_what_is_better(task):
    lower = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: false}]"
    assert is_better_higher(task("one", lower)) is False
    assert is_better_higher(task("two", FILTERED)) is True
    assert is_better_higher(f"{task('two', FILTERED)}.exact_match,loose") is True
