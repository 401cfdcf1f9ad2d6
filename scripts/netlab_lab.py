"""A laboratory of Linux hosts on one machine: namespaces joined by cables that can be broken.

    with Lab(hosts=3, rtt_ms=100, mbit=100) as lab:
        server = lab.host("h1").popen(["python", "-m", "http.server"])
        lab.cut("h1", "h2")
        lab.link("h1", "h3").set(rtt_ms=300)

Each host is a network namespace with the kernel's own TCP and UDP; only the wire is ours: a TUN
device per host and a router process (netlab_router) between them. Needs root, /dev/net/tun and `ip`
(`why_not` tells what is missing); NATs need `nft` too.

Invariants:
 1. Leaving the `with` ends every process in the hosts and removes every namespace and device,
    whatever went wrong before. A lab whose process was killed is removed when the next one starts.
 2. Names carry the process id, so labs of several processes never meet.
 3. A change to a cable is in force when the call returns, for all that is sent from then on.
 4. Nothing outside the lab's namespaces is changed: no route, no rule, no setting of this machine.
    A device is made here and moved into its namespace before it is up.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import netlab_namespace as namespaces
from netlab_namespace import Nat, why_not
from netlab_wire import Cable, Tally

__all__ = ["Cable", "Host", "Lab", "Link", "Nat", "Tally", "why_not"]

MOST_HOSTS = 250
GRACE_SECONDS = 5.0
"""What processes get between being asked to end and being killed."""

_counter = itertools.count()


@dataclass(frozen=True)
class Host:
    """One machine of the lab. `address` is what others reach; behind a NAT its own is another."""

    name: str
    namespace: str
    address: str
    own_address: str
    environment: Mapping[str, str]  # NETLAB_HOST, NETLAB_ADDRESS, NETLAB_PEERS
    _begun: list["subprocess.Popen[Any]"] = field(default_factory=list)

    def popen(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a program on this host. Options are subprocess.Popen's; NETLAB_... join its `env`.

        The process has the id of the program itself and a session of its own; the lab ends it.
        """
        given = options.pop("env", None)
        environment = {**(os.environ if given is None else given), **self.environment}
        process: subprocess.Popen[Any] = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            env=environment,
            start_new_session=True,
            **options,
        )
        self._begun.append(process)
        return process

    def run(self, command: Sequence[str], within: float = 60.0) -> str:
        """Run a program to its end and return what it printed. CalledProcessError if it failed."""
        process = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, errors = process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(command), out, errors)
        return str(out)

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """Return an IPv4 socket of this host for use in this process. The caller closes it."""
        return namespaces.inside(self.namespace, lambda: socket.socket(socket.AF_INET, kind))

    def processes(self) -> set[int]:
        """Return the ids of all that runs on this host, whoever started it."""
        begun = {process.pid for process in self._begun if process.poll() is None}
        return begun | namespaces.processes(self.namespace)

    def kill(self) -> None:
        """End all processes of this host at once, as a power cut would."""
        namespaces.end(self.processes, grace_seconds=-1)


@dataclass(frozen=True)
class Link:
    """The cable between two hosts, as a handle."""

    lab: "Lab"
    a: str
    b: str

    @property
    def cable(self) -> Cable:
        return self.lab.cables[frozenset((self.a, self.b))]

    def set(self, **changes: Any) -> None:
        """Change some fields of the cable, from now on. ValueError for a cable that cannot be."""
        self.lab.change(self.a, self.b, replace(self.cable, **changes))


class Lab:
    """Hosts and the cables between them, one per pair; a context."""

    def __init__(
        self,
        hosts: int | Sequence[str] = 2,
        *,
        cable: Cable | None = None,
        nats: Mapping[str, Nat] | None = None,
        seed: int = 0,
        **fields: Any,
    ) -> None:
        """Describe a lab; entering it makes it. Fields are those of `Cable`, for all pairs.

        A number of hosts are named h1, h2, ... ; `seed` decides which packets a lossy cable loses.
        """
        self.names = [f"h{n + 1}" for n in range(hosts)] if isinstance(hosts, int) else list(hosts)
        self.nats = dict(nats or {})
        if not 1 <= len(self.names) <= MOST_HOSTS or len(set(self.names)) < len(self.names):
            raise ValueError(f"a lab has 1 to {MOST_HOSTS} hosts of different names")
        if odd := [name for name in self.names if not name.isidentifier()]:
            raise ValueError(f"a host's name is letters, digits and _, not {odd[0]!r}")
        if unknown := set(self.nats) - set(self.names):
            raise ValueError(f"a NAT needs a host: there is no {', '.join(sorted(unknown))}")
        self._first = replace(cable or Cable(), **fields)
        self._seed = seed
        self._stack = ExitStack()
        self._ask = threading.Lock()
        self._hosts: dict[str, Host] = {}
        pairs = itertools.combinations(self.names, 2)
        self.cables = {frozenset(pair): self._first for pair in pairs}
        self._addresses = {name: f"10.77.0.{n + 1}" for n, name in enumerate(self.names)}

    def __enter__(self) -> Self:
        """Make everything. RuntimeError says what is missing or failed; nothing is left then."""
        if reason := why_not(with_nat=bool(self.nats)):
            raise RuntimeError(f"no lab here: {reason}")
        namespaces.sweep()
        self._id = f"{os.getpid()}-{next(_counter)}"
        try:
            with ExitStack() as undone:
                undone.callback(self._undo)
                self._build()
                undone.pop_all()
        except subprocess.CalledProcessError as failed:
            raise RuntimeError(f"no lab here: {failed.stderr.strip() or failed}") from failed
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo()

    def _undo(self) -> None:
        """Remove everything, not to be interrupted: a second Ctrl-C would leave half of it."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._stack.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def host(self, name: str) -> Host:
        return self._hosts[name]

    def link(self, a: str, b: str) -> Link:
        if frozenset((a, b)) not in self.cables:
            raise ValueError(f"no cable joins {a} and {b}")
        return Link(self, a, b)

    def cut(self, a: str, b: str | None = None) -> None:
        """Let everything between two hosts vanish, silently; without `b`, all cables of `a`."""
        for link in self._links(a, b):
            link.set(is_cut=True)

    def mend(self, a: str, b: str | None = None) -> None:
        """Let it flow again. What was sent meanwhile stays lost."""
        for link in self._links(a, b):
            link.set(is_cut=False)

    def change(self, a: str, b: str, cable: Cable) -> None:
        """Make the cable between two hosts such a one, from now on."""
        way = [self.names.index(a), self.names.index(b)]
        self._command({"change": [way, asdict(cable)]})
        self.cables[frozenset((a, b))] = cable

    def tallies(self) -> dict[tuple[str, str], Tally]:
        """Return what the router delivered and dropped so far, by direction."""
        found = self._command({"tallies": True})["tallies"]
        return {(self.names[a], self.names[b]): Tally.from_dict(facts) for a, b, facts in found}

    def _links(self, a: str, b: str | None) -> list[Link]:
        others = [b] if b is not None else [name for name in self.names if name != a]
        return [self.link(a, other) for other in others]

    def _build(self) -> None:
        ends = {name: self._make_host(name) for name in self.names}
        # named by process, lab and host, in the 15 characters that Linux has for a device
        process, lab = self._id.split("-")
        tuns = {
            name: f"nl{int(process):x}.{int(lab):x}.{number:x}"
            for number, name in enumerate(self.names)
        }
        self._start_router(tuns)
        for name in self.names:
            namespaces.plug(ends[name], tuns[name], self._hosts[name].address)
        self._stack.callback(self.end_hosts)  # the first to run: the wire outlives the programs

    def _make_host(self, name: str) -> str:
        """Make a host, and a NAT before it if it has one; return where its cables end."""
        inner, address = self._make_namespace(name), self._addresses[name]
        own = namespaces.INNER_ADDRESS if name in self.nats else address
        peers = " ".join(f"{n}={there}" for n, there in self._addresses.items() if n != name)
        environment = {"NETLAB_HOST": name, "NETLAB_ADDRESS": own, "NETLAB_PEERS": peers}
        self._hosts[name] = Host(name, inner, address, own, environment)
        if name not in self.nats:
            return inner
        outer = self._make_namespace(f"{name}-nat")
        namespaces.make_nat(outer, inner, self.nats[name])
        return outer

    def _make_namespace(self, name: str) -> str:
        namespace = f"{namespaces.PREFIX}-{self._id}-{name}"
        self._stack.callback(namespaces.remove, namespace)
        namespaces.make(namespace)
        return namespace

    def end_hosts(self) -> None:
        """Ask all programs on all hosts to end, all at once; kill those that are slow to."""
        hosts = list(self._hosts.values())
        namespaces.end(lambda: {pid for host in hosts for pid in host.processes()}, GRACE_SECONDS)

    def _start_router(self, tuns: Mapping[str, str]) -> None:
        self._router = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("netlab_router.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the lab, which then ends the router
        )
        self._stack.callback(_end_router, self._router)
        hosts = [{"tun": tuns[name], "address": self._hosts[name].address} for name in self.names]
        self._command({"hosts": hosts, "seed": self._seed, "cable": asdict(self._first)})

    def _command(self, command: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._router.stdin, self._router.stdout
        with self._ask:
            if stdin is None or stdout is None or self._router.poll() is not None:
                raise RuntimeError("the lab's router has ended")
            stdin.write(json.dumps(command) + "\n")
            stdin.flush()
            line = stdout.readline()
        if not line:
            raise RuntimeError("the lab's router has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _end_router(router: "subprocess.Popen[str]") -> None:
    if router.stdin is not None:
        with suppress(BrokenPipeError):
            router.stdin.close()  # which ends it
    try:
        router.wait(5)
    except subprocess.TimeoutExpired:
        router.kill()
        router.wait()
    if router.stdout is not None:
        router.stdout.close()
