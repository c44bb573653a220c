"""Packed sequences, held-out perplexity and multiple-choice accuracy of a language model."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from autoq.bundled.language import documents
from autoq.bundled.questions import MultipleChoiceQuestion

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

SEQUENCE_LENGTH = 256
_QUESTIONS_PER_BATCH = 16


def packed_sequences(
    tokenizer: PreTrainedTokenizerFast, seed: int, split: str, length: int = SEQUENCE_LENGTH
) -> Iterator[list[int]]:
    """Yield token sequences of one length, cut from documents that stand between bos and eos."""
    waiting: list[int] = []
    texts = documents(seed, split)
    while True:
        for ids in tokenizer(list(itertools.islice(texts, 64)))["input_ids"]:
            waiting += [*ids, tokenizer.eos_token_id]
        while len(waiting) >= length:
            yield waiting[:length]
            waiting = waiting[length:]


def held_out_sequences(
    tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int, length: int = SEQUENCE_LENGTH
) -> torch.Tensor:
    """Return at least `tokens` held-out tokens as rows of one length."""
    import torch

    rows = itertools.islice(
        packed_sequences(tokenizer, seed, "held_out", length), math.ceil(tokens / length)
    )
    return torch.tensor(list(rows))


def perplexity(model: Any, sequences: torch.Tensor, batch: int = 16) -> float:
    """Return the perplexity per token over all rows; the first token of a row is not predicted."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for rows in torch.split(sequences, batch):
            logits = model(input_ids=rows).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            ).item()
    return math.exp(total / sequences[:, 1:].numel())


def choice_accuracy(
    model: Any, tokenizer: PreTrainedTokenizerFast, questions: list[MultipleChoiceQuestion]
) -> dict[str, float]:
    """Return the share of right answers for each kind of question and for `all`."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(questions), _QUESTIONS_PER_BATCH):
        group = questions[start : start + _QUESTIONS_PER_BATCH]
        for question, chosen in zip(group, _chosen(model, tokenizer, group), strict=True):
            right[question["kind"]].append(chosen == question["answer"])
    accuracies = {kind: sum(marks) / len(marks) for kind, marks in sorted(right.items())}
    accuracies["all"] = sum(map(sum, right.values())) / len(questions)
    return accuracies


def _chosen(
    model: Any, tokenizer: PreTrainedTokenizerFast, questions: list[MultipleChoiceQuestion]
) -> list[int]:
    prompts = [question["question"] for question in questions for _ in question["choices"]]
    choices = [choice for question in questions for choice in question["choices"]]
    scores = iter(_choice_scores(model, tokenizer, prompts, choices))
    chosen = []
    for question in questions:
        own = list(itertools.islice(scores, len(question["choices"])))
        chosen.append(own.index(max(own)))
    return chosen


def _choice_scores(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[str], choices: list[str]
) -> list[float]:
    """The log-likelihood of each choice after its prompt."""
    import torch

    prompt_ids: list[list[int]] = tokenizer(prompts)["input_ids"]
    choice_ids: list[list[int]] = tokenizer(choices, add_special_tokens=False)["input_ids"]
    longest = max(len(a) + len(b) for a, b in zip(prompt_ids, choice_ids, strict=True))
    rows = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    counted = torch.zeros(rows.shape, dtype=torch.bool)
    for row, (prompt, choice) in enumerate(zip(prompt_ids, choice_ids, strict=True)):
        end = len(prompt) + len(choice)
        rows[row, :end] = torch.tensor(prompt + choice)
        counted[row, len(prompt) : end] = True
    # Padding stands on the right, where causal attention keeps it out of every counted position.
    with torch.inference_mode():
        likelihoods = model(input_ids=rows).logits[:, :-1].float().log_softmax(-1)
    picked = likelihoods.gather(-1, rows[:, 1:, None]).squeeze(-1)
    scores: list[float] = (picked * counted[:, 1:]).sum(-1).tolist()
    return scores
