"""How fast engines carry messages between two hosts, played by network namespaces (root and iproute2 are needed).

python benchmarks/engines.py [--json FILE]

Half a round trip of small messages, and a stream of large ones with eight in flight, over a link as fast as the machine
and over one of 1 Gbit/s. Every byte of the streams is checked after each run. NIXL is left out where it is missing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from anyep.errors import Unavailable
from anyep.testing.engine_steps import finish, meet
from anyep.testing.hosts import Hosts, interface_bytes
from anyep.transport.engine import Bytes, Engine
from anyep.transport.engines import open_engine
from anyep.transport.nixl_agent import load_nixl

RUNS = 5
TRIPS = 200
SMALL = (64, 7 << 10, 14 << 10)
LARGE = (256 << 10, 1 << 20, 4 << 20)
STREAM_BYTES = 48 << 20
WINDOW = 8
LINKS = (None, 1000.0)


def measure(group: Any, rank: int, name: str) -> dict[str, Any]:
    """What one rank of two sees of an engine."""
    engine = open_engine(name, group).engine
    meet(engine)
    rows = {
        "half_round_trip_us": {size: [trip_us(engine, size) for _ in range(RUNS)] for size in SMALL},
        "stream": {size: [stream(engine, size) for _ in range(RUNS)] for size in LARGE},
        "facts": engine.describe(),
    }
    meet(engine)
    engine.close()
    return rows


def trip_us(engine: Engine, size: int) -> float:
    """Half a round trip, the median of many."""
    peer, sent, got = 1 - engine.rank, np.ones(size, np.uint8), np.zeros(size, np.uint8)
    times = []
    for _ in range(TRIPS):
        incoming = engine.receive(peer, 0, got)
        began = time.perf_counter()
        if engine.rank == 0:
            engine.send(peer, 0, sent)
            finish(engine, [incoming])
        else:
            finish(engine, [incoming])
            engine.send(peer, 0, sent)
        times.append((time.perf_counter() - began) / 2 * 1e6)
    meet(engine)
    return median(times)


def stream(engine: Engine, size: int) -> dict[str, float]:
    """Rank 0 sends to rank 1: seconds, and what the interface carried beyond the messages, both ways, as a share."""
    count = STREAM_BYTES // size
    memory = [pattern(tag, size) if engine.rank == 0 else np.zeros(size, np.uint8) for tag in range(WINDOW)]
    meet(engine)
    before, began = interface_bytes(), time.perf_counter()
    act = engine.send if engine.rank == 0 else engine.receive
    pending = []
    for tag in range(count):
        if len(pending) == WINDOW:
            finish(engine, [pending.pop(0)])
        pending.append(act(1 - engine.rank, tag, memory[tag % WINDOW]))
    finish(engine, pending)
    took_s, after = time.perf_counter() - began, interface_bytes()
    for tag, piece in enumerate(memory[:count]):
        if not np.array_equal(piece, pattern(tag, size)):
            raise RuntimeError(f"the message in window {tag} arrived with wrong bytes")
    carried = after.sent - before.sent if engine.rank == 0 else after.received - before.received
    return {"seconds": took_s, "wire_share": carried / (count * size)}


def pattern(tag: int, size: int) -> Bytes:
    return np.arange(tag, tag + size, dtype=np.int64).astype(np.uint8)


def row(name: str, link_mbit: float | None, told: list[dict[str, Any]]) -> dict[str, Any]:
    """Latency is rank 0's, a stream is over when rank 1 has it."""
    trips = {size: summary(times) for size, times in told[0]["half_round_trip_us"].items()}
    streams = {}
    for size, runs in told[1]["stream"].items():
        rates = [STREAM_BYTES / run["seconds"] / 1e9 for run in runs]
        streams[size] = {
            "gb_per_s": summary(rates),
            "wire_bytes_per_byte": round(median(run["wire_share"] for run in told[0]["stream"][size]), 4),
        }
        if link_mbit is not None:
            streams[size]["use_of_link"] = round(median(rates) * 8e3 / link_mbit, 3)
    facts = {"facts": told[0]["facts"], "half_round_trip_us": trips, "stream": streams}
    return {"engine": name, "link_mbit": link_mbit, **facts}


def summary(values: list[float]) -> dict[str, float]:
    return {key: float(f"{act(values):.4g}") for key, act in (("median", median), ("min", min), ("max", max))}


def names() -> list[str]:
    try:
        load_nixl()
    except Unavailable as error:
        print(f"without NIXL: {error}")
        return ["gloo"]
    return ["gloo", "nixl"]


def main() -> None:
    rows = []
    for link_mbit in LINKS:
        for name in names():
            with Hosts(2, link_mbit=link_mbit) as hosts, hosts.start([1, 1], measure, name) as ranks:
                rows.append(row(name, link_mbit, ranks.results(120)))
            print(tell(rows[-1]))
    if "--json" in sys.argv[1:]:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "runs": RUNS, "window": WINDOW}
        text = json.dumps({"machine": machine, "rows": rows}, indent=1)
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(text + "\n")


def tell(row: dict[str, Any]) -> str:
    link = "as fast as it goes" if row["link_mbit"] is None else f"{row['link_mbit']:g} Mbit/s"
    trips = ", ".join(f"{size} B {us['median']:.0f} us" for size, us in row["half_round_trip_us"].items())
    streams = ", ".join(
        f"{size >> 10} KiB {s['gb_per_s']['median']:.3g} GB/s"
        + (f" ({s['use_of_link']:.0%})" if link[0] != "a" else "")
        for size, s in row["stream"].items()
    )
    return f"{row['engine']:5} over a link of {link}: half a round trip {trips}; {streams}"


if __name__ == "__main__":
    main()
