"""The other processes of a job: which are missing, and which have stopped answering.

Every rank listens on its own port and writes its address into the job's store before any process
group exists. Without failures nobody connects. When a collective fails, a rank connects to every
other rank and sends a notice. As long as that process lives, its kernel accepts the connection,
whatever the process is doing; after its end the connection is refused. A rank that refuses, and
has sent no notice before, has died.

One rank reports the failure. A rank that has received notices exits silently; of several ranks that
failed at the same moment, the lowest reports. This does not need the job's store, which may have
died with rank 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_dwm.config.errors import LostPeer, RunError, UserError
from megatron_dwm.launch import Launch, find_launch

_PREFIX = "megatron_dwm"
_CONNECT_S = 3.0  # a host that is down does not refuse; it does not answer
_MOMENT_S = 1.0  # ranks that fail within this time fail at the same moment, on a busy machine too
_OTHERS_S = 1.5  # silent ranks wait, so that the reporting rank prints first
_ENDING_S = 3.0  # a killed process may close its connections before its port
_LATER_S = 3.0  # ranks that wait in the same collective give up within this time
_AT_ONCE = 256  # connections open at the same time

_BROKEN = re.compile(r"gloo/|Connection (closed|reset|refused)|Broken pipe|[Tt]imed? ?out")
_TIMED_OUT = re.compile(r"[Tt]imed? ?out")


@dataclass(frozen=True)
class Peer:
    """The host of a rank, and the address and port at which it listens."""

    rank: int
    host: str
    address: str
    port: int


class Peers:
    """The ranks of this job, seen from one of them."""

    def __init__(self, rank: int, ranks: list[Peer], listener: socket.socket) -> None:
        self._rank, self._others = rank, [peer for peer in ranks if peer.rank != rank]
        self._listener = listener
        self._notices: dict[int, bool] = {}  # by rank: True if it is about to report
        self._heard_s = time.monotonic()

    def heard(self) -> None:
        """Record that every rank has just taken part in a collective."""
        self._heard_s = time.monotonic()

    def raise_lost(self, error: Exception) -> NoReturn:
        """Raise LostPeer if a collective failed with `error` because of a peer, else raise `error`.

        Exits with 1 if another rank reports the failure.
        """
        silent_s = time.monotonic() - self._heard_s
        is_ours = not _is_broken(error)
        self._read_notices()
        reports = is_ours or not self._notices
        refused = self._send_notice(reports)
        if is_ours:
            raise error
        time.sleep(_MOMENT_S)
        self._read_notices()
        if not reports or any(does for rank, does in self._notices.items() if rank < self._rank):
            time.sleep(_OTHERS_S - _MOMENT_S)
            sys.exit(1)
        self._raise_report(error, silent_s, refused)

    def _raise_report(self, error: Exception, silent_s: float, refused: set[Peer]) -> NoReturn:
        timed_out = bool(_TIMED_OUT.search(str(error)))
        if ended := self._find_ended(refused, 0.0 if timed_out else _ENDING_S):
            verb, owner = ("does", "its process has") if len(ended) == 1 else ("do", "they have")
            raise LostPeer(
                f"{_names(ended)} {verb} not answer: {owner} ended; heard from last "
                f"{silent_s:.0f} s ago"
            ) from error
        if not timed_out:
            raise error
        time.sleep(_LATER_S)
        self._read_notices()
        waited_for = [peer for peer in self._others if peer.rank not in self._notices]
        raise LostPeer(
            f"no answer for {silent_s:.0f} s (parallel.timeout_s) from "
            f"{_names(waited_for or self._others)}, though every process is alive"
        ) from error

    def _send_notice(self, reports: bool) -> set[Peer]:
        """Tell every other rank that this one exits; returns the ranks that refuse."""
        return _refusing(self._others, f"{self._rank} {int(reports)}".encode())

    def _read_notices(self) -> None:
        self._listener.setblocking(False)
        with contextlib.suppress(OSError):  # until no connection is left
            while True:
                with self._listener.accept()[0] as connection:
                    connection.setblocking(False)
                    with contextlib.suppress(OSError):  # a connection without a notice
                        words = connection.recv(64).split()
                        self._notices |= {int(words[0]): words[1] == b"1"} if words else {}

    def _find_ended(self, refused_before: set[Peer], patience_s: float) -> list[Peer]:
        """Returns the ranks that have died; asks again until one has, or patience ends."""
        deadline, pause_s = time.monotonic() + patience_s, 0.1
        while True:
            refused = refused_before | _refusing(self._others)
            self._read_notices()
            ended = [peer for peer in refused if peer.rank not in self._notices]
            if ended or time.monotonic() > deadline:
                return sorted(ended, key=lambda peer: peer.rank)
            time.sleep(pause_s)
            pause_s *= 2


@contextmanager
def meet(timeout_s: int) -> Iterator[tuple[dist.Store, Peers]]:
    """Wait until every rank has started; yields the store for torch's process groups and the peers.

    Raises LostPeer if a rank has not started after `timeout_s`. Waits in Python, so that Ctrl-C
    works.
    """
    launch, attempt = find_launch(os.environ), _attempt()
    rank, world_size = launch.rank, launch.world_size
    is_here = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + timeout_s
    address = _wait_for_store(launch, timeout_s, is_here=is_here)
    whole = _store(launch, timeout_s, is_here=is_here)
    store = dist.PrefixStore(f"{_PREFIX}{attempt}", whole)
    with _listener(2 * world_size) as listener:
        port = listener.getsockname()[1]
        store.set(f"rank/{rank}", json.dumps([rank, socket.gethostname(), address, port]))
        store.add("came", 1)
        _wait_for_all(store, world_size, deadline, timeout_s)
        texts = store.multi_get([f"rank/{other}" for other in range(world_size)])
        ranks = [Peer(*json.loads(text)) for text in texts]
        yield dist.PrefixStore(f"default_pg{attempt}", whole), Peers(rank, ranks, listener)


def _attempt() -> str:
    """Returns what tells this attempt's keys in torchrun's store from those of attempts before it.

    Raises UserError if torchrun may restart processes on several machines: each counts its own.
    """
    several = int(os.environ.get("GROUP_WORLD_SIZE") or 1) > 1
    if several and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0:
        raise UserError(
            "torchrun --max-restarts: expected 0 on several machines; start torchrun again after a "
            "failure, with --run.resume true"
        )
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _store(launch: Launch, timeout_s: int, *, is_here: bool) -> dist.Store:
    """Returns the job's store, opened here or at rank 0."""
    try:
        return dist.TCPStore(
            launch.host,
            launch.port,
            launch.world_size,
            is_here,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        if not is_here or "EADDRINUSE" not in str(error):
            raise
        raise RunError(
            f"rank 0 on {socket.gethostname()}: port {launch.port} is in use; start again, with "
            "another MASTER_PORT if it repeats"
        ) from error


def _wait_for_store(launch: Launch, timeout_s: int, *, is_here: bool) -> str:
    """Wait for the job's store to answer; returns this rank's address as the others see it."""
    host, port = launch.host, launch.port
    deadline = time.monotonic() + timeout_s
    while not is_here:
        try:
            with socket.create_connection((host, port), timeout=_CONNECT_S) as connection:
                mine = connection.getsockname()[0]
            # On the store's machine this may be the loopback, which other machines cannot reach.
            return host if mine.startswith("127.") or mine == "::1" else mine
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostPeer(
                    f"rank {launch.rank} on {socket.gethostname()}: no answer for "
                    f"{timeout_s} s (parallel.timeout_s) from rank 0, expected at {host}:{port} "
                    f"(MASTER_ADDR, MASTER_PORT): {error}"
                ) from error
            time.sleep(0.1)
    return host


def _wait_for_all(store: dist.Store, world_size: int, deadline: float, timeout_s: int) -> None:
    pause_s = 0.01
    while store.add("came", 0) < world_size:
        if time.monotonic() > deadline:
            absent = [r for r in range(world_size) if not store.check([f"rank/{r}"])]
            reports = store.add("speakers", 1) == 1
            time.sleep(_OTHERS_S)  # this rank may hold the store, and the others still read it
            if not reports:
                sys.exit(1)
            raise LostPeer(
                f"{_numbers(absent)} of {world_size} did not start within {timeout_s} s "
                "(parallel.timeout_s), or ended before that; see their own output"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.5)


def _listener(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=backlog)


def _refusing(peers: list[Peer], notice: bytes = b"") -> set[Peer]:
    """Returns the peers that refuse a connection; if none does, those that do not answer it."""
    refused: set[Peer] = set()
    silent: set[Peer] = set()
    for first in range(0, len(peers), _AT_ONCE):
        _connect(peers[first : first + _AT_ONCE], notice, refused, silent)
    return refused or silent


def _connect(peers: list[Peer], notice: bytes, refused: set[Peer], silent: set[Peer]) -> None:
    poll, asked = select.poll(), {}
    for peer in peers:
        try:
            found = socket.getaddrinfo(peer.address, peer.port, type=socket.SOCK_STREAM)
        except OSError:  # a name that no longer resolves says nothing about the process
            continue
        one = socket.socket(found[0][0], socket.SOCK_STREAM)
        one.setblocking(False)
        one.connect_ex(found[0][4])
        poll.register(one, select.POLLOUT)
        asked[one.fileno()] = (one, peer)
    deadline = time.monotonic() + _CONNECT_S
    while asked and (left_s := deadline - time.monotonic()) > 0:
        for number, _ in poll.poll(left_s * 1000):
            one, peer = asked.pop(number)
            poll.unregister(number)
            try:
                one.send(notice)
            except OSError:
                refused.add(peer)
            one.close()
    for one, peer in asked.values():
        silent.add(peer)
        one.close()


def _is_broken(error: Exception) -> bool:
    """True if torch or gloo report with it that a collective failed."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error)))


def _names(peers: list[Peer]) -> str:
    """Returns the peers in words, such as `ranks 0, 1 on node7 and rank 4 on node8`."""
    by_host: dict[str, list[int]] = {}
    for peer in peers:
        by_host.setdefault(peer.host, []).append(peer.rank)
    return " and ".join(f"{_numbers(ranks)} on {host}" for host, ranks in by_host.items())


def _numbers(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
