"""`autoq eval --tasks`: what is printed, and the exit code where a task did not run."""

import json

import pytest

TASKS = {
    "tasks": [
        {
            "task": "arc_easy",
            "metrics": {
                "arc_easy.acc": {
                    "value": 0.5,
                    "low": 0.4,
                    "high": 0.6,
                    "original": 0.55,
                    "difference": {"value": -0.05, "low": -0.1, "high": -0.01, "verdict": "worse"},
                },
                "arc_easy.acc_norm": {"value": 0.75, "low": float("-inf"), "high": float("inf")},
            },
            "versions": {"arc_easy": 1.0},
            "examples": {"arc_easy": 40},
            "limit": 40,
            "harness": "lm_eval 0.4.13",
            "configurations": {},
        }
    ],
    "task_failures": [],
}


@pytest.fixture
def evaluated(api, monkeypatch):
    """Lets a test say what the API finds."""

    def find(**found):
        original = type(api).evaluate

        def evaluate(self, target, *, progress, **options):
            return {**original(self, target, progress=progress, **options), **found}

        monkeypatch.setattr(type(api), "evaluate", evaluate)

    return find


def test_names_are_passed_on(api, run, evaluated):
    evaluated(**TASKS)
    run(
        *("eval", "llama-ab12", "--tasks", "arc_easy, my_task.yaml,", "--limit", "7"),
        *("--task-batch-size", "3", "--metrics", "kl_p99", "--cache", "outputs"),
        *("--cache-gb", "0.5"),
    )
    passed = api.arguments("evaluate")
    assert passed["tasks"] == ("arc_easy", "my_task.yaml")
    assert passed["limit"] == 7
    assert passed["task_batch_size"] == "3"
    assert passed["metrics"] == ("kl_p99",)
    assert str(passed["cache"]) == "outputs"
    assert passed["cache_gb"] == 0.5


def test_tasks_stand_below_the_metrics(run, evaluated):
    evaluated(**TASKS)
    result = run("eval", "llama-ab12", "--tasks", "arc_easy")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-3:] == [
        "arc_easy (version 1.0, 40 examples):",
        "  acc: 0.5000 (95 %: 0.4000 to 0.6000), original 0.5500, difference -0.0500 (worse)",
        "  acc norm: 0.7500",
    ]


def test_json_has_the_tasks(run, evaluated):
    evaluated(**TASKS)
    found = json.loads(run("eval", "llama-ab12", "--tasks", "arc_easy", "--json").stdout)
    assert found["tasks"][0]["metrics"]["arc_easy.acc"]["value"] == 0.5
    assert found["tasks"][0]["metrics"]["arc_easy.acc_norm"]["low"] is None


def test_a_task_that_did_not_run_ends_with_2_after_the_others(run, evaluated):
    error = "the task hellaswag needs the dataset hellaswag, and there is no network; leave it out"
    evaluated(**{**TASKS, "task_failures": [{"task": "hellaswag", "error": error}]})
    result = run("eval", "llama-ab12", "--tasks", "arc_easy,hellaswag")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"error: {error}"
    assert "  acc norm: 0.7500" in result.stdout.splitlines()


def test_a_lower_bound_is_called_one(run, evaluated):
    evaluated(kl_lower_bound={"kept_tokens": 10})
    assert run("eval", "llama-ab12").stdout.splitlines()[-1] == (
        "  (KL divergence is a lower bound: the cache keeps 10 tokens of each distribution; "
        "--cache-gb allows more)"
    )


def test_a_noise_floor_that_was_asked_for_is_printed(run, evaluated):
    evaluated(metrics={"noise_floor": {"value": 0.25, "low": None, "high": None}})
    assert run("eval", "llama-ab12").stdout.splitlines()[-1] == "  noise floor: 0.2500"
