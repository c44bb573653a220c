"""What a service is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8731


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """Everything that `autoq serve` is told; folders are checked by `Roots`, not here."""

    store: str  # file path or URL
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    models: tuple[Path, ...] = ()  # folders below which models may be read
    data: tuple[Path, ...] = ()  # folders below which calibration data may be read
    exports: Path | None = None  # folder that checkpoints may be written to; None: none may
    token_file: Path | None = None  # None: no tokens, and loopback only
    allowed_hosts: tuple[str, ...] = ()  # further names in `Host`, of a proxy for example
    workers: int = 1  # runners to start; 0: others run jobs
    max_job_memory: int | None = None  # bytes
    ray: str | None = None  # address of a Ray cluster that jobs go to
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    dashboard: str | None = None  # address of Optuna's dashboard on the same store, for the page
    rate_limit: float | None = 300.0  # requests a second of one client; None: any number
    streams_each: int = 32  # connections that one client may listen on
    streams_together: int = 512
