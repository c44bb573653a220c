"""Workers that are ranks of one launch, as `torchrun -m autoq search ...` starts them.

Rank 0 searches. The others connect to it over TCP and score what it gives them. torch.distributed
itself is not initialised: a rank that dies ends its connection, and nobody waits for it. Where rank
0 listens, and the word that opens, is in the launch's own store, which only its ranks are to reach.
"""

from __future__ import annotations

import hmac
import json
import os
import queue
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, BinaryIO

import torch

from autoq.api.distribution.dealing import BatchWorker, WorkerLostError
from autoq.api.distribution.messages import Message, receive, send
from autoq.api.distribution.streams import StreamWorker, serve
from autoq.errors import DataError, InputError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_STORE_WAIT = timedelta(days=7)  # rank 0 may calibrate before it listens; if it ends, so do all
_HELLO_SECONDS = 30.0
_CLOSED = None


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launcher says in the environment."""

    rank: int
    ranks: int
    local_rank: int
    address: str
    port: int
    attempt: str  # a launch whose ranks were started again has another
    agent_store: bool  # the launcher keeps the store, and not rank 0

    def device(self, configured: str) -> str:
        """The device of this rank, where the configuration leaves the choice."""
        if configured not in ("auto", "cuda") or not torch.cuda.is_available():
            return configured
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise InputError(
                f"a machine has one rank for each GPU, here {count}, and this is its rank "
                f"{self.local_rank}; start fewer (--nproc-per-node), or give --device cpu"
            )
        return f"cuda:{self.local_rank}"


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The launch that this process belongs to; None where it is on its own.

    Raises:
        InputError: the environment speaks of ranks, and not as launchers do.
    """
    if any(name not in environment for name in _VARIABLES):
        return None
    try:
        found = Launch(
            rank=int(environment["RANK"]),
            ranks=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
            address=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    except ValueError as error:
        raise InputError(
            f"{', '.join(_VARIABLES)} must be as torchrun sets them ({error}); unset them, or start "
            "autoq with torchrun"
        ) from None
    return found if found.ranks > 1 else None


def required_launch() -> Launch:
    """
    Raises:
        InputError: this process is on its own, or is not rank 0.
    """
    launch = launch_of()
    if launch is None or launch.rank:
        raise InputError(
            "ranks=True is for rank 0 of a launch of several ranks; start the program with torchrun, "
            "and call serve_rank in the other ranks"
        )
    return launch


class RankWorker(StreamWorker):
    """A rank that connects, or has."""

    def __init__(self, name: str, arrivals: queue.Queue[socket.socket | None]) -> None:
        super().__init__(name, device=None, threads=None)
        self._arrivals = arrivals
        self._connection: socket.socket | None = None
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._is_closed = False

    def _streams(self) -> tuple[BinaryIO, BinaryIO]:
        if self._files is None:
            self._connection = self._arrivals.get()
            if self._connection is None or self._is_closed:
                self._arrivals.put(self._connection)  # for the next who waits
                raise WorkerLostError("it did not connect")
            self._files = self._connection.makefile("rb"), self._connection.makefile("wb")
        return self._files

    def _last_words(self) -> str:
        return "its connection ended"

    def close(self) -> None:
        """End the connection; the rank connects again if it is wanted again."""
        self._is_closed = True
        if self._connection is None:
            self._arrivals.put(_CLOSED)
            return
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class RanksCrew:
    """The other ranks, for rank 0."""

    scores_here = True
    threads: int | None = None  # the launcher has set them

    def __init__(self, launch: Launch) -> None:
        """Listen from now on."""
        self._launch = launch
        self._token = secrets.token_hex(32)
        self._listener = socket.create_server((launch.address, 0))
        self._arrivals: queue.Queue[socket.socket | None] = queue.Queue()
        self._is_closed = False
        self._store = _store(launch)
        port = self._listener.getsockname()[1]
        self._store.set(_key(launch), json.dumps({"port": port, "token": self._token}))
        threading.Thread(target=self._accept, daemon=True, name="ranks").start()

    def prepare(self) -> None:
        """Ranks are there already."""

    def workers(self) -> Sequence[BatchWorker]:
        """See `Crew`."""
        with self._arrivals.mutex:  # what closed workers have left
            while _CLOSED in self._arrivals.queue:
                self._arrivals.queue.remove(_CLOSED)
        return [
            RankWorker(f"rank {number}", self._arrivals) for number in range(1, self._launch.ranks)
        ]

    def close(self) -> None:
        """Stop listening, which ends all ranks."""
        self._is_closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._turn_away()

    def _turn_away(self) -> None:
        """End the connections that nobody waits for any more."""
        with suppress(queue.Empty):
            while True:
                connection = self._arrivals.get_nowait()
                if connection is not None:
                    connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            # A thread for each: nobody waits for a stranger who says nothing.
            threading.Thread(target=self._let_in, args=(connection,), daemon=True).start()

    def _let_in(self, connection: socket.socket) -> None:
        if self._is_known(connection):
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._arrivals.put(connection)
            if self._is_closed:  # it was being let in meanwhile
                self._turn_away()
        else:
            connection.close()

    def _is_known(self, connection: socket.socket) -> bool:
        connection.settimeout(_HELLO_SECONDS)
        try:
            with connection.makefile("rb") as stream:
                told = str(receive(stream, from_stranger=True).header.get("token", ""))
        except (OSError, EOFError, DataError):
            return False
        return hmac.compare_digest(told.encode(errors="replace"), self._token.encode())


def serve_rank(launch: Launch, *, device: str) -> None:
    """Score what rank 0 gives, until it has ended.

    Args:
        device: the configured one.
    """
    own = launch.device(device)
    store: Any = _store(launch)
    try:
        told = json.loads(store.get(_key(launch)))
    except (RuntimeError, ValueError):
        return  # rank 0 ended before it had work, and its store with it
    while True:
        try:
            connection = socket.create_connection((launch.address, told["port"]))
        except OSError:
            return
        with suppress(OSError), connection:
            _serve_over(connection, Message({"token": told["token"]}), own)


def _serve_over(connection: socket.socket, hello: Message, device: str) -> None:
    with connection.makefile("rb") as reader, connection.makefile("wb") as writer:
        send(writer, hello)
        serve(reader, writer, device=device, threads=torch.get_num_threads())


def _store(launch: Launch) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        launch.address,
        launch.port,
        is_master=launch.rank == 0 and not launch.agent_store,
        timeout=_STORE_WAIT,
        wait_for_workers=False,
    )


def _key(launch: Launch) -> str:
    return f"autoq/{launch.attempt}"
