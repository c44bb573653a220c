"""Halves of a task's examples: what is in which, and that the harness runs no other."""

import json
import random

import pytest
import torch

from autoq.errors import InputError
from autoq.evaluators._task_examples import (
    FEWEST_FRESH_EXAMPLES,
    ExamplePart,
    content_of,
    samples_sha256,
)
from autoq.evaluators.protocol import Subject
from autoq.evaluators.tasks import count_examples, run_tasks
from autoq.testing.tiny_models import make_byte_tokenizer, make_tiny_model

CHOOSING, FRESH = (ExamplePart(seed=0, fresh=fresh) for fresh in (False, True))

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
"""


@pytest.fixture(scope="module")
def tiny():
    model = make_tiny_model("llama", dtype=torch.float32)
    return Subject(model=model, tokenizer=make_byte_tokenizer())


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """Writes a task of so many examples, and gives its path."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def write(count, text="then"):
        rows = [{"text": f"{n} {text}", "label": n % 2} for n in range(count)]
        (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "letters.yaml").write_text(TASK)
        return str(tmp_path / "letters.yaml")

    return write


def halves(examples, seed=0):
    """The contents in either half."""
    return [
        [examples[i] for i in ExamplePart(seed=seed, fresh=fresh).indices({"t": examples})["t"]]
        for fresh in (False, True)
    ]


def test_halves_share_no_example_and_leave_none_out():
    examples = [{"number": n} for n in range(100)]
    choosing, fresh = halves(examples)
    assert len(fresh) == 50
    numbers = sorted(entry["number"] for entry in choosing + fresh)
    assert numbers == list(range(100))


def test_where_an_example_belongs_is_decided_by_its_content_alone():
    examples = [{"number": n} for n in range(100)]
    _, fresh = halves(examples)
    random.Random(1).shuffle(examples)
    assert sorted(map(content_of, halves(examples)[1])) == sorted(map(content_of, fresh))
    other = halves(examples, seed=1)[1]
    assert sorted(map(content_of, other)) != sorted(map(content_of, fresh))


def test_equal_examples_are_in_one_half():
    examples = [{"number": n % 80} for n in range(160)]
    choosing, fresh = halves(examples)
    assert {e["number"] for e in choosing}.isdisjoint(e["number"] for e in fresh)
    assert len(fresh) == 80  # 40 of 80 different ones, each twice


def test_of_few_examples_none_is_held_out():
    enough = 2 * FEWEST_FRESH_EXAMPLES
    assert len(halves([{"n": n} for n in range(enough)])[1]) == FEWEST_FRESH_EXAMPLES
    choosing, fresh = halves([{"n": n} for n in range(enough - 1)])
    assert (len(choosing), fresh) == (enough - 1, [])


def test_tasks_of_a_group_are_counted_together():
    examples = {name: [{name: n} for n in range(40)] for name in ("one", "two")}
    found = FRESH.indices(examples)
    assert {name: len(indices) for name, indices in found.items()} == {"one": 20, "two": 20}


def test_of_a_group_with_a_task_of_one_example_none_is_held_out():
    """Or the harness could not confirm: it runs every task of the group."""
    examples = {"one": [{"n": 0}, {"n": 0}], "many": [{"n": n} for n in range(100)]}
    assert FRESH.indices(examples) == {"one": [], "many": []}
    assert CHOOSING.indices(examples) == {"one": [0, 1], "many": list(range(100))}


def test_the_harness_runs_one_half_or_the_other(letters, tiny):
    path = letters(70)
    count = count_examples(path, CHOOSING)
    assert (count.fresh, count.everything, count.suffices) == (35, 70, True)
    whole, choosing, fresh = (
        run_tasks(tiny, [path], examples=part).runs[0] for part in (None, CHOOSING, FRESH)
    )
    examples = [{"text": f"{n} then", "label": n % 2} for n in range(70)]
    for run, part in ((choosing, CHOOSING), (fresh, FRESH)):
        places = part.indices({"letters": examples})["letters"]
        own = [whole.estimates["letters.acc"].per_sequence[place] for place in places]
        assert list(run.estimates["letters.acc"].per_sequence) == own
        assert run.examples == {"letters": 35}


def test_of_a_small_task_there_is_nothing_fresh_to_run(letters, tiny):
    path = letters(10)
    count = count_examples(path, FRESH)
    assert (count.fresh, count.everything, count.suffices) == (0, 10, False)
    assert run_tasks(tiny, [path], examples=CHOOSING).runs[0].examples == {"letters": 10}
    (failure,) = run_tasks(tiny, [path], examples=FRESH).failures
    with pytest.raises(InputError, match=r"no fresh examples of letters, of 10 in all, and 32"):
        raise failure.error


def test_the_hash_of_the_data_is_that_of_what_was_asked(letters, tiny):
    """Equal for equal documents, another for another document or another selection of them."""

    def hashed(path, **options):
        return run_tasks(tiny, [path], **options).runs[0].data_sha256

    found = hashed(letters(4))
    assert found == hashed(letters(4))
    assert found == hashed(letters(8), limit=4)
    assert found != hashed(letters(8), limit=5)
    assert found != hashed(letters(4, text="than"))


def test_the_hash_of_the_data_counts_each_document_once():
    sample = {"doc_id": 0, "doc": {"a": 1}, "prompt_hash": "p", "target_hash": "t"}
    twice = [{**sample, "filter": name} for name in ("strict", "loose")]
    assert samples_sha256({"t": twice}) == samples_sha256({"t": [sample]})
    assert samples_sha256({"t": [sample]}) != samples_sha256({"u": [sample]})


def test_what_lies_in_memory_is_no_content():
    assert content_of({"a": object()}) == content_of({"a": object()})
