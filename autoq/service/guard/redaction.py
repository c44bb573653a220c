"""What must not stand in logs: tokens, and the passwords of databases."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from autoq.service.guard.tokens import TOKEN_PREFIX

HIDDEN = "***"

_SECRETS = re.compile(
    rf"(?P<token>{TOKEN_PREFIX}[A-Za-z0-9_-]{{8,}})"
    r"|(?P<bearer>(?i:\bbearer)(?:\s+|%20|\+))[^\s'\",)\]}]+"
    r"|(?P<user>://[^:/?#\s@]*:)[^\s/]*(?=@)"
    r"|(?P<field>(?i:\b(?:ssl)?password=))[^\s&'\"]+"
)


def redacted(text: str, secrets: Sequence[str] = ()) -> str:
    """The text without tokens, passwords in URLs and connection strings, and these secrets."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _SECRETS.sub(_hidden, text)


def _hidden(match: re.Match[str]) -> str:
    return (match["bearer"] or match["user"] or match["field"] or "") + HIDDEN


def secrets_of(store: str) -> tuple[str, ...]:
    """The password of a store's URL, as it is written there and as the database takes it."""
    try:
        password = urlsplit(store).password
    except ValueError:
        return ()
    return tuple({password, unquote(password)}) if password else ()


class RedactingFilter(logging.Filter):
    """Takes secrets out of every record, of its traceback too. Belongs on handlers: the filters of
    loggers do not see what comes from loggers below them."""

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        super().__init__()
        self._secrets = tuple(secrets)

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; none is dropped."""
        record.msg, record.args = redacted(_message(record), self._secrets), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redacted(record.exc_text, self._secrets)
        if record.stack_info:
            record.stack_info = redacted(record.stack_info, self._secrets)
        return True


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # a message that does not fit its arguments is still said
        return f"{record.msg} {record.args}"


def log_configuration(store: str) -> dict[str, Any]:
    """What `logging.config.dictConfig`, and so uvicorn, is told: to standard error, without secrets.

    Args:
        store: URL of the store, whose password is one of them.
    """
    logger = {"handlers": ["all"], "level": "INFO", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"secrets": {"()": RedactingFilter, "secrets": secrets_of(store)}},
        "formatters": {
            "all": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
        },
        "handlers": {
            "all": {
                "class": "logging.StreamHandler",
                "filters": ["secrets"],
                "formatter": "all",
            }
        },
        "root": {"handlers": ["all"], "level": "WARNING"},
        "loggers": {
            "uvicorn": logger,
            "autoq": logger,
        },
    }
