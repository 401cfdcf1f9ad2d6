"""Network namespaces of Linux, made, filled and removed with `ip`; what netlab_lab builds hosts of.

Invariants:
 1. A name begins with the process that made it: netlab-PID-...; so what a killed process left
    behind is told from what is in use, and `sweep` removes it.
 2. Removing and ending never fail: they run on the way out of whatever went wrong.
 3. A process is signalled because it lives in one of our namespaces, never by its name.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from netlab_wire import QUEUE_PACKETS

Nat = Literal["preserving", "random"]
"""How a NAT picks the port others see: the host's own if it is free, or any, anew per peer."""

PREFIX = "netlab"
CLONE_NEWNET = 0x40000000
NAMESPACES = Path("/run/netns")
INNER_ADDRESS, GATEWAY_ADDRESS = "192.168.77.2", "192.168.77.1"

NAT_RULES = """
table ip netlab {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "lan" accept
  }
  chain input {
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iifname "lan" accept
  }
  chain postrouting {
    type nat hook postrouting priority 100;
    oifname "wire" masquerade HOW
  }
}
"""
"""Unasked packets from outside vanish, those to the NAT itself too: nobody answers with a reset."""

T = TypeVar("T")


def why_not(*, with_nat: bool = False) -> str | None:
    """Return why no lab can be had here, as half a sentence; None: it can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun to use"
    packages = {"ip": "iproute2"} | ({"nft": "nftables"} if with_nat else {})
    for tool, package in packages.items():
        if shutil.which(tool) is None:
            return f"the command {tool} is missing (Debian package {package})"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    remove(probe)
    return None if made.returncode == 0 else f"no namespace can be made: {made.stderr.strip()}"


def ip(*words: str) -> None:
    """Run `ip`. CalledProcessError, with what it said in `stderr`."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def make(namespace: str) -> None:
    """Make a namespace that knows nothing but its loopback. CalledProcessError if refused."""
    ip("netns", "add", namespace)
    ip("-n", namespace, "link", "set", "lo", "up")
    # one machine's taste in congestion control must not decide what is measured in a lab
    with suppress(OSError):
        write_setting(namespace, "ipv4/tcp_congestion_control", "cubic")


def plug(namespace: str, tun: str, address: str) -> None:
    """Move a TUN device into a namespace, as `wire`, with an address and the way to all others."""
    ip("link", "set", tun, "netns", namespace, "name", "wire")
    with suppress(OSError):  # IPv6 says things unasked
        write_setting(namespace, "ipv6/conf/wire/disable_ipv6", "1")
    ip("-n", namespace, "link", "set", "wire", "txqueuelen", str(QUEUE_PACKETS), "up")
    ip("-n", namespace, "address", "add", f"{address}/24", "dev", "wire")


def make_nat(outer: str, inner: str, nat: Nat) -> None:
    """Join two namespaces so that `inner` reaches the world through `outer`, and nobody `inner`."""
    pair = ["lan", "type", "veth", "peer", "name", "lan", "netns", inner]
    ip("-n", outer, "link", "add", *pair)
    for namespace, address in ((outer, GATEWAY_ADDRESS), (inner, INNER_ADDRESS)):
        ip("-n", namespace, "address", "add", f"{address}/24", "dev", "lan")
        ip("-n", namespace, "link", "set", "lan", "up")
    ip("-n", inner, "route", "add", "default", "via", GATEWAY_ADDRESS)
    write_setting(outer, "ipv4/ip_forward", "1")
    rules = NAT_RULES.replace("HOW", "fully-random" if nat == "random" else "")
    command = ["ip", "netns", "exec", outer, "nft", "-f", "-"]
    subprocess.run(command, input=rules, check=True, capture_output=True, text=True)


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Return what `work` returns when called in the namespace. OSError if it cannot be entered.

    It runs in a thread of its own, which ends in that namespace: this thread never leaves its own.
    """
    results: list[T] = []
    errors: list[OSError] = []

    def enter() -> None:
        try:
            with (NAMESPACES / namespace).open() as door:
                if ctypes.CDLL(None, use_errno=True).setns(door.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"{namespace} cannot be entered")
            results.append(work())
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def write_setting(namespace: str, setting: str, value: str) -> None:
    """Write one of the kernel's network settings of a namespace. OSError if refused."""
    inside(namespace, lambda: (Path("/proc/sys/net") / setting).write_text(value))


def processes(namespace: str) -> set[int]:
    """Return the ids of the processes that run in a namespace; the dead are left out."""
    command = ["ip", "netns", "pids", namespace]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return {pid for pid in map(int, listed.stdout.split()) if _is_running(pid)}


def _is_running(pid: int) -> bool:
    """Whether a process is more than a name that its parent has not yet asked for."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal processes, as far as they are there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def end(find: Callable[[], set[int]], grace_seconds: float) -> None:
    """Ask the processes that `find` finds to end; kill those that do not within the grace.

    Returns when none is left, or 5 s later if the kernel does not let one go.
    """
    asked: set[int] = set()
    deadline = time.monotonic() + grace_seconds
    while (alive := find()) and time.monotonic() < deadline + 5:
        if time.monotonic() > deadline:
            send_signal(alive, signal.SIGSTOP)  # so that none lives to tell of another's end
            send_signal(alive, signal.SIGKILL)
        else:
            send_signal(alive - asked, signal.SIGTERM)  # once: a second one means haste to some
            asked |= alive
        time.sleep(0.02)


def remove(namespace: str) -> None:
    """Remove a namespace if it is there."""
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def sweep() -> None:
    """Remove what labs of processes that are no more left behind."""
    if not NAMESPACES.is_dir():
        return
    for path in NAMESPACES.glob(f"{PREFIX}-*"):
        pid = path.name.split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            send_signal(processes(path.name), signal.SIGKILL)
            remove(path.name)
