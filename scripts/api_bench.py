"""What the API adds to plain sessions: requests a second, the first token, each later one.

    python scripts/api_bench.py --model FOLDER --spans 0:4,4:8 --clients 1,8,32 --rounds 5

Starts one server for each span and `swarm api` on loopback. Then, in turns, so many clients at once
ask the same of both: plain sessions of a client in this process, as `swarm generate` has them, and
streams over HTTP. Prints a table, or JSON with --json. Run it on a machine with nothing else to do.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import trio
from processes import SWARM, end, environment, serving

from swarm.client import Client
from swarm.generate import GenerateSettings, generate
from swarm.invite import decode_invite
from swarm.prompt import open_joined
from swarm.settings import DEMO_FOLDER

PROMPT = "Once upon a time there was a little girl who had a dog."
MARK = b'"text":"'


@dataclass(frozen=True)
class Times:
    """When the tokens of one request came, in seconds from its begin."""

    tokens: tuple[float, ...]

    @property
    def per_token(self) -> float:
        return (self.tokens[-1] - self.tokens[0]) / max(len(self.tokens) - 1, 1)


Ask = Callable[[], Awaitable[Times]]


async def plain(client: Client, count: int) -> Times:
    """One session, as `swarm generate` has it."""
    prompt = client.model.tokens.encode(PROMPT)
    began, times = trio.current_time(), []

    def note(_token: int) -> bool:
        times.append(trio.current_time() - began)
        return False

    settings = GenerateSettings(most_tokens=count, end_ids=frozenset())
    async with client.session(len(prompt) + count, prompt=prompt) as session:
        await generate(session, prompt, settings, note)
    return Times(tuple(times))


async def over_http(address: str, model: str, count: int) -> Times:
    """One stream over a connection of its own, hardly parsed: a client's own work is not measured.

    Chunks that came together count as tokens that did.
    """
    body = {"model": model, "prompt": PROMPT, "max_tokens": count, "temperature": 0}
    data = json.dumps({**body, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    host, _, port = address.rpartition(":")
    began, times, end = trio.current_time(), [], b""
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(head.encode() + data)
        while not end.endswith(b"\r\n0\r\n\r\n"):
            part = await stream.receive_some(65536)
            if not part or not (end or part.startswith(b"HTTP/1.1 200")):
                raise SystemExit(f"the API answered {part!r}")
            now = trio.current_time() - began
            times += [now] * part.count(MARK)
            end = (end + part)[-16:]
    return Times(tuple(times[:-1]))  # the last chunk says why it ended


async def together(ask: Ask, clients: int) -> dict[str, float]:
    """Ask at once for so many clients."""
    made: list[Times] = []

    async def one() -> None:
        made.append(await ask())

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(one)
    seconds = trio.current_time() - began
    return {
        "requests_per_second": clients / seconds,
        "first_ms": 1000 * median(times.tokens[0] for times in made),
        "token_ms": 1000 * median(times.per_token for times in made),
    }


async def compare(
    join: str, address: str, model: str, wanted: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rounds: both ways in turns, and which is first changes."""
    rows = []
    async with open_joined(decode_invite(join)) as client:
        ways: dict[str, Ask] = {
            "plain": partial(plain, client, wanted.tokens),
            "api": partial(over_http, address, model, wanted.tokens),
        }
        for clients in wanted.clients:
            rounds: dict[str, list[dict[str, float]]] = {"plain": [], "api": []}
            for number in range(wanted.rounds + 1):
                for way in sorted(ways, reverse=number % 2 == 0):
                    made = await together(ways[way], clients)
                    if number:  # the first round warms both up
                        rounds[way].append(made)
            rows.append({"clients": clients, **_row(rounds)})
    return rows


def _row(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and the medians of what a round's two ways differ by."""
    row: dict[str, Any] = {
        way: {name: median(each[name] for each in made) for name in made[0]}
        for way, made in rounds.items()
    }
    pairs = list(zip(rounds["api"], rounds["plain"], strict=True))
    for name in ("first_ms", "token_ms"):
        row[f"added_{name}"] = median(api[name] - bare[name] for api, bare in pairs)
    return row


def measure(wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the swarm and the API, compare, end them."""
    with tempfile.TemporaryDirectory(prefix="swarm-api-bench-") as name:
        home = Path(name)
        with (
            serving(home, wanted.model, wanted.spans) as servers,
            (home / "api.log").open("w") as log,
        ):
            command = [*SWARM, "api", "--join", servers[0].join, "--json"]
            api = subprocess.Popen(
                command, env=environment(home), stdout=subprocess.PIPE, stderr=log, text=True
            )
            try:
                line = api.stdout.readline() if api.stdout is not None else ""
                url = json.loads(line or "{}").get("api")
                if url is None:
                    raise SystemExit(f"swarm api ended: {(home / 'api.log').read_text()}")
                model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
                address = url.removeprefix("http://")
                return trio.run(compare, servers[0].join, address, model, wanted)
            finally:
                end([api])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_FOLDER)
    parser.add_argument("--spans", type=lambda text: text.split(","), default=["0:4", "4:8"])
    parser.add_argument(
        "--clients", type=lambda text: [int(each) for each in text.split(",")], default=[1, 8, 32]
    )
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    rows = measure(wanted)
    if wanted.json:
        print(json.dumps({"tokens": wanted.tokens, "rounds": wanted.rounds, "rows": rows}))
        return
    print("clients  way    requests/s  first ms  ms a token")
    for row in rows:
        for way in ("plain", "api"):
            made = row[way]
            print(
                f"{row['clients']:7}  {way:5}  {made['requests_per_second']:10.2f}"
                f"  {made['first_ms']:8.1f}  {made['token_ms']:10.2f}"
            )
        print(
            f"{'':7}  added  {'':10}  {row['added_first_ms']:8.1f}  {row['added_token_ms']:10.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
