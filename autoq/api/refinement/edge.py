"""Refusing what a refinement cannot do, before a model is loaded and anything is scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from autoq.api.refinement._metrics import Aim, check_can_have, check_names
from autoq.errors import InputError, ModelError
from autoq.evaluators import Subject
from autoq.evaluators.tasks import count_examples
from autoq.models.loading import load_tokenizer_if_any, unloaded_model
from autoq.studies import is_in_memory

if TYPE_CHECKING:
    from autoq.api.refinement.options import RefineOptions
    from autoq.api.study import Study


def check_before_search(
    options: RefineOptions,
    model: str | Path | nn.Module,
    store_url: str,
    workers: int,
    trust_remote_code: bool,
) -> None:
    """Refuse at the beginning of a search what its refinement would refuse at the end.

    Raises:
        InputError: as `check_aim` and `check_workers`.
    """
    check_workers(workers, has_folder=not isinstance(model, nn.Module), store_url=store_url)
    check_aim(options.aim, model, trust_remote_code=trust_remote_code)


def check_study(study: Study, options: RefineOptions, workers: int) -> None:
    """The same for a study that was searched before.

    Raises:
        InputError: as `check_aim` and `check_workers`.
    """
    folder = study.record.model_path
    check_workers(workers, has_folder=bool(folder), store_url=study.store.url)
    check_aim(
        options.aim,
        folder or study.loaded().model,
        trust_remote_code=study.trusts_remote_code,
    )


def check_workers(workers: int, *, has_folder: bool, store_url: str) -> None:
    """Refuse numbers of processes that cannot be, and sharing what no other process can read.

    Args:
        has_folder: the model can be read from one.
    Raises:
        InputError: fewer than one, or the model or the store is in memory.
    """
    if workers < 1:
        raise InputError(f"workers must be >= 1, got {workers}")
    if workers == 1:
        return
    if not has_folder:
        raise InputError(
            "other workers read the model from its folder, and this study was made from a model "
            "in memory; refine it with one worker"
        )
    if is_in_memory(store_url):
        raise InputError(
            "workers share trials through the store, and this one is in memory; name a file or a "
            "database with --store"
        )


def check_aim(aim: Aim, model: str | Path | nn.Module, *, trust_remote_code: bool) -> None:
    """Refuse metrics and tasks that are not known, not of such a model, or cannot be had here.

    Of a folder only the configuration and the tokenizer are read: the model is built without
    weights. Tasks fetch their data here, so that it is not missed after hours.

    Raises:
        UnknownNameError, InputError: as `check_names` and `check_can_have`.
        DataError: a task needs a dataset that cannot be had.
        ModelError: the folder has a tokenizer that cannot be read.
    """
    check_names(aim)
    if not (aim.asked.evaluators or aim.asked.tasks):
        return
    subject = _subject(model, trust_remote_code=trust_remote_code)
    if subject is not None:
        check_can_have(aim, subject)
    if aim.examples is not None:
        for task in aim.tasks:
            count_examples(task, aim.examples)


def _subject(model: str | Path | nn.Module, *, trust_remote_code: bool) -> Subject | None:
    """A model that can be asked what it is; None where that needs its weights."""
    if isinstance(model, nn.Module):
        return Subject(model=model)
    try:
        built: Any = unloaded_model(model, trust_remote_code=trust_remote_code)
    except ModelError:
        return None  # loading it says what is wrong, if anything is
    tokenizer = load_tokenizer_if_any(model, trust_remote_code=trust_remote_code)
    return Subject(model=built, tokenizer=tokenizer)
