#!/usr/bin/env python3
"""Count the repairs of a swarm in which nothing fails, while other programs keep the cores busy.

    python scripts/false_repairs.py [--minutes 10] [--busy 0.5]

Three servers of the demo model say text after text; a burner for each core computes for the share
`busy` of every tenth of a second. Every repair counted here is a false one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio
from bench import entered
from processes import ServerProcess, serving

from swarm.errors import SwarmError
from swarm.generate import GenerateSettings, generate
from swarm.settings import DEMO_FOLDER

PROMPT = "Once upon a time, there was"
TOKENS = 200

BURNER = """
import sys, time
share = float(sys.argv[1])
while True:
    end = time.perf_counter() + 0.1 * share
    while time.perf_counter() < end:
        pass
    time.sleep(0.1 * (1 - share))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--busy", type=float, default=0.5, help="share of each core, 0 to 1")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarm-busy-") as folder:
        home = Path(folder)
        with serving(home, DEMO_FOLDER, ["0:3", "3:6", "6:8"]) as servers:
            burners = [
                subprocess.Popen([sys.executable, "-c", BURNER, str(asked.busy)])
                for _ in range(os.cpu_count() or 1)
            ]
            try:
                print(json.dumps(trio.run(speak, servers, home, asked.minutes, asked.busy)))
            finally:
                for burner in burners:
                    burner.kill()
                    burner.wait(10)


async def speak(
    servers: list[ServerProcess], home: Path, minutes: float, busy: float
) -> dict[str, float]:
    """Generate until the time is over; return what was counted."""
    texts = repairs = failed = slowest = 0.0
    end = time.monotonic() + 60 * minutes
    async with entered(servers, home) as (client, _):
        ids = client.model.tokens.encode(PROMPT)
        settings = GenerateSettings(most_tokens=TOKENS, end_ids=frozenset())
        while time.monotonic() < end:
            began = time.monotonic()
            async with client.session(len(ids) + TOKENS) as session:
                try:
                    await generate(session, ids, settings)
                except SwarmError:
                    failed += 1
                repairs += session.journal.failovers
            texts += 1
            slowest = max(slowest, (time.monotonic() - began) / TOKENS)
    return {
        "minutes": minutes,
        "busy": busy,
        "texts": texts,
        "tokens": texts * TOKENS,
        "false_repairs": repairs,
        "failed": failed,
        "slowest_ms_per_token": slowest * 1000,
    }


if __name__ == "__main__":
    main()
