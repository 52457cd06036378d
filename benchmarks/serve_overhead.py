"""What HTTP costs: the same streams from the engine alone, through asyncio, and through `qwench serve`.

    python benchmarks/serve_overhead.py MODEL [--streams 32] [--tokens 256] [--repeats 3] [--device D] [key=value ...]

MODEL "tiny" makes a small model with random weights, whose steps take so little that the way to the client is most of
the work: the worst case. Each way generates `streams` answers of `tokens` tokens at once; the ways take turns, and the
fastest round of each counts. Processor time is that of the process that generates; on a machine that does other
things too it says more than tokens a second. The client reads bytes and does not parse them. Writes
benchmarks/results/serve_overhead.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import selectors
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from results import write_result
from serve_load import KEY, ServerProcess, make_tiny

from qwench import config
from qwench.engine import Engine, EngineConfig
from qwench.types import SamplingParams


def prompts_of(engine: Engine, streams: int) -> list[list[int]]:
    return [engine.tokenizer.encode(f"The number {number}") for number in range(streams)]


def engine_alone(engine: Engine, streams: int, params: SamplingParams) -> None:
    engine.generate(prompts_of(engine, streams), params)


def through_asyncio(engine: Engine, streams: int, params: SamplingParams) -> None:
    async def one(prompt: list[int]) -> None:
        async with aclosing(engine.astream(prompt, params)) as chunks:
            async for _ in chunks:
                pass

    async def every() -> None:
        await asyncio.gather(*(one(prompt) for prompt in prompts_of(engine, streams)))

    asyncio.run(every())


def through_http(port: int, streams: int, tokens: int) -> int:
    """Bytes that came. Requests are written by hand, so that the client costs as little as it can."""
    selector, size = selectors.DefaultSelector(), 0
    for number in range(streams):
        body = json.dumps({
            "model": "model", "prompt": f"The number {number}", "temperature": 0, "max_tokens": tokens,
            "ignore_eos": True, "stream": True,
        }).encode()  # fmt: skip
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {KEY}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(head.encode() + body)
        selector.register(connection, selectors.EVENT_READ, bytearray())
    while selector.get_map():
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(1 << 16)
            size += len(data)
            key.data.extend(data)
            if not data:
                if b"data: [DONE]" not in key.data:
                    raise SystemExit(f"a stream broke off: {bytes(key.data[-300:])!r}")
                selector.unregister(key.fileobj)
                key.fileobj.close()
    return size


def processor_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("settings", nargs="*", help="settings of the engine, key=value")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_intermixed_args()
    streams, tokens = arguments.streams, arguments.tokens
    settings = [f"max_seqs={streams}", *arguments.settings]
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model
        if model == "tiny":
            model = str(Path(directory) / "tiny")
            make_tiny(Path(model))
        server = ServerProcess(model, settings, 0, arguments.device, streams)
        engine = Engine(model, arguments.device, config=config.load(EngineConfig, settings))
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        ways: dict[str, tuple[int, Callable[[], Any]]] = {
            "engine alone": (os.getpid(), lambda: engine_alone(engine, streams, params)),
            "through asyncio": (os.getpid(), lambda: through_asyncio(engine, streams, params)),
            "through HTTP": (server.process.pid, lambda: through_http(server.port, streams, tokens)),
        }
        best: dict[str, dict[str, float]] = {}
        try:
            for repeat in range(arguments.repeats + 1):
                for name, (pid, way) in ways.items():
                    started, before = time.perf_counter(), processor_s(pid)
                    way()
                    seconds, busy = time.perf_counter() - started, processor_s(pid) - before
                    count = streams * tokens
                    now = {"tokens_per_s": count / seconds, "processor_us_per_token": busy / count * 1e6}
                    if repeat:  # the first round builds what is built once
                        known = best.setdefault(name, now)
                        best[name] = {
                            "tokens_per_s": round(max(known["tokens_per_s"], now["tokens_per_s"]), 1),
                            "processor_us_per_token": round(
                                min(known["processor_us_per_token"], now["processor_us_per_token"]), 1
                            ),
                        }
        finally:
            engine.close()
            server.stop()
    print(f"{'':20}{'tokens/s':>12}{'processor us/token':>22}")
    for name, values in best.items():
        print(f"{name:20}{values['tokens_per_s']:12.1f}{values['processor_us_per_token']:22.1f}")
    write_result("serve_overhead", {"streams": streams, "tokens": tokens, "ways": best})


if __name__ == "__main__":
    main()
