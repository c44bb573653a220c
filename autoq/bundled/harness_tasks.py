"""Small evaluation tasks in the bundled language, for lm-eval: their data, and how it was made.

`python -m autoq.bundled.harness_tasks` writes the data files again. Tasks take them through
`choices` and `texts`, so that they need no path, no cache and no network.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from autoq.bundled import tasks_path
from autoq.bundled.language import documents, multiple_choice_questions

_MODEL = "autoq.api.evaluating.harness_model:AutoqModel"

SEED = 7
"""Not 0, so that the texts are not those that plans are measured on by default."""

QUESTIONS = 200
TEXTS = 24
_JOINED = 8
"""Documents in the last text, which is longer than the model's context."""


def question_rows() -> list[dict[str, Any]]:
    """Multiple-choice questions of four kinds, in turns; two or four choices each."""
    questions = multiple_choice_questions(SEED, QUESTIONS)
    return [
        {"question": q["question"], "choices": q["choices"], "answer": q["answer"]}
        for q in questions
    ]


def text_rows() -> list[dict[str, str]]:
    """Held-out documents."""
    found = itertools.islice(documents(SEED, "held_out"), TEXTS - 1 + _JOINED)
    texts = list(found)
    return [{"text": text} for text in [*texts[: TEXTS - 1], "".join(texts[TEXTS - 1 :])]]


def write_data(folder: Path) -> None:
    """Write the data files of both tasks."""
    for name, rows in (("choices", question_rows()), ("texts", text_rows())):
        lines = [json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def choices(**_: Any) -> dict[str, Any]:
    """The data of the task `autoq_choices`, as lm-eval wants it."""
    return _dataset("choices")


def texts(**_: Any) -> dict[str, Any]:
    """The data of the task `autoq_text`."""
    return _dataset("texts")


def register_model() -> None:
    """Tell lm-eval of the model `autoq`; what it needs is imported when it is first asked for."""
    import lm_eval.models  # noqa: F401  (its own models first: it adds them to an empty list only)
    from lm_eval.api.registry import model_registry

    if "autoq" not in model_registry:
        model_registry.register("autoq", target=_MODEL)


def _dataset(name: str) -> dict[str, Any]:
    import datasets

    lines = (tasks_path() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


if __name__ == "__main__":
    write_data(tasks_path())
