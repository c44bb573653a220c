"""Commands that a server answers: what they take, and who asks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import typer

from autoq.cli import _remote_jobs as jobs
from autoq.cli import _remote_look as look
from autoq.cli import _remote_make as make
from autoq.cli._failures import reports_failures
from autoq.cli._servers import Asked
from autoq.client import Client
from autoq.errors import InputError


@dataclass(frozen=True, slots=True)
class _Command:
    """How a server answers a command, and which of its parameters can be asked."""

    ask: Callable[[Client, Asked], None]
    takes: frozenset[str]


_BUDGETS = ("bits", "max_gb", "max_active_bits")

_SEARCH = (
    *("model", *_BUDGETS, "max_latency_ms", "max_kl", "gpu", "latency_batch", "formats"),
    *("kv_formats", "kv_bits", "kv_scope", "calib", "export", "container", "target", "rule"),
    *("include", "exclude", "name", "calib_sequences", "sequence_length", "batch_size"),
    *("held_out_sequences", "dtype", "device", "max_memory", "calibration", "estimator"),
    *("confidence", "seed", "overwrite", "no_measure", "compare_uniform", "refine", "report"),
    *("as_json", "quiet"),
)
_REFINE = ("study", "trials", "metric", "objective", *_BUDGETS, "as_json", "quiet")
_EXPORT = ("places", *_BUDGETS, "container", "tp", "pp", "overwrite", "as_json", "quiet")


def _command(ask: Callable[[Client, Asked], None], *takes: str) -> _Command:
    return _Command(ask, frozenset(takes))


COMMANDS = {
    "list": _command(look.ask_list, "limit", "everything", "as_json"),
    "show": _command(look.ask_show, "study", *_BUDGETS, "as_json"),
    "frontier": _command(look.ask_frontier, "study", "points", "png", "html", "as_json"),
    "report": _command(look.ask_report, "output", "study"),
    "formats": _command(look.ask_formats, "as_json"),
    "targets": _command(look.ask_targets, "target", "as_json"),
    "search": _command(make.ask_search, *_SEARCH),
    "refine": _command(make.ask_refine, *_REFINE),
    "export": _command(make.ask_export, *_EXPORT),
    "eval": _command(make.ask_eval, "target", "bits", "as_json", "quiet"),
    "verify": _command(make.ask_verify, "checkpoint", "target", "as_json"),
    "jobs": _command(jobs.ask_jobs, "limit", "status", "study", "kind", "as_json"),
    "cancel": _command(jobs.ask_cancel, "job", "as_json"),
    "resume": _command(jobs.ask_resume, "job", "as_json"),
}

_REASONS = {
    "store": "the server has a store of its own",
    "trust_remote_code": "code that a model's folder brings never runs for the network",
    "latency_table": "the file is on this machine",
    "cache": "the folder is on this machine",
    "outputs": "the folder is on this machine",
    "dry_run": "what it estimates is this machine",
    "ray": "where jobs run is the server's to say",
    "workers": "where jobs run is the server's to say",
    "devices": "where jobs run is the server's to say",
    "wait": "the server's jobs wait for each other",
}


@reports_failures
def run(name: str, asked: Asked) -> None:
    """Ask the server, and print what it says.

    Raises:
        typer.Exit: it refuses, or something is wrong with what it found.
    """
    _check_options(COMMANDS[name], asked)
    with warnings.catch_warnings(), _client(asked) as client:
        COMMANDS[name].ask(client, asked)


def _check_options(command: _Command, asked: Asked) -> None:
    for name in sorted(asked.given - command.takes):
        reason = _REASONS.get(name, "the service does not offer it")
        raise InputError(
            f"{asked.names.get(name, name)} cannot be asked of a server: {reason}; leave it out, "
            "or leave out --server (and AUTOQ_SERVER)"
        )


def _client(asked: Asked) -> Client:
    variable = asked.server.token_variable
    # An empty variable is one that is not set; the client would look for its own.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        client = Client(asked.server.url, token=os.environ.get(variable, ""))
    for warning in caught:
        typer.echo(f"note: {warning.message}", err=True)
    return client
