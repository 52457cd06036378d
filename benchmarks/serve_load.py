"""Load on a running `qwench serve`: many streaming clients, some of which misbehave, and what is left afterwards.

    python benchmarks/serve_load.py MODEL [--clients 200] [--seconds 300] [--max-tokens 64] [key=value ...]
    python benchmarks/serve_load.py MODEL --kill [--clients 50] [--seconds 60]

MODEL "tiny" makes a small model with random weights, for machines where the server and not the model is of interest.
Starts the server as a process of its own (further key=value arguments are its engine's settings). Each client repeats:
a streamed chat that is read to the end; one that is dropped in the middle; a whole answer that is not waited for; a
prompt that does not fit; malformed JSON; a wrong key; an unknown field. It checks that

* every greedy answer is that of `NaiveGenerator` on the same checkpoint, made before (--no-naive: that all answers to
  one question are the same, and the same as on the idle server). Left out are questions in whose answer the two best
  tokens come nearer than --margin: there, the rounding of another batch size may decide;
* no block of the cache is missing at the end;
* every misuse got its status and code, and no request failed in another way.

With --kill the server is killed and started again every few seconds meanwhile; clients must see nothing worse than a
refused or broken connection. Prints how memory grew and how long clients waited, and writes
benchmarks/results/serve_load.json or serve_kill.json; the exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
from results import write_result

KEY = "load-test"
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
SETTLE_S = 30.0


class ServerProcess:
    """`qwench serve` on a fixed port, so that clients find it again after a restart."""

    def __init__(self, model: str, settings: list[str], port: int, device: str, max_concurrent: int) -> None:
        self.command = [
            sys.executable, "-m", "qwench.cli", "serve", model, *settings, "--port", str(port), "--device", device,
            "--served-model-name", "model", "--max-concurrent", str(max_concurrent), "--log-level", "warning",
        ]  # fmt: skip
        self.port = port
        self.start()

    def start(self) -> None:
        environment = os.environ | {"QWENCH_API_KEYS": KEY}
        started = time.perf_counter()
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        found = None
        for line in self.process.stdout:
            if found := re.search(r"API (http://\S+)/v1", line):
                break
        if found is None:
            raise SystemExit("the server did not start")
        self.url, self.start_s = found[1], time.perf_counter() - started
        self.port = int(self.url.rpartition(":")[2])
        self.command[self.command.index("--port") + 1] = str(self.port)

    def memory_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def make_tiny(directory: Path) -> None:
    """A checkpoint with random weights and a vocabulary of 512, large enough that its greedy answers are distinct."""
    import torch

    from qwench.model.config import ModelConfig
    from qwench.model.decoder import CausalLM
    from qwench.model.weights import save_pretrained
    from qwench.tokenizer import train

    library = Path(os.__file__).parent
    tokenizer = train(
        [(library / name).read_text(encoding="utf-8") for name in ("abc.py", "bisect.py", "heapq.py")], 512
    )
    config = ModelConfig(
        vocab_size=tokenizer.padded_vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=tokenizer.eod_id, eos_token_id=tokenizer.eod_id,
    )  # fmt: skip
    model = CausalLM(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
    save_pretrained(model, directory, tokenizer=tokenizer)


def naive_answers(model: str, arguments: argparse.Namespace) -> dict[int, str]:
    """Greedy answers to the questions, without those that hang on less than `margin` of log-probability."""
    from qwench.engine.naive import NaiveGenerator
    from qwench.model.checkpoint import locate
    from qwench.model.load import load_model
    from qwench.ops.hardware import pick_device
    from qwench.tokenizer import Tokenizer
    from qwench.types import SamplingParams

    where, device = locate(model), pick_device(arguments.device)
    loaded = load_model(where, device, "bfloat16" if device.type == "cuda" else "float32")
    naive = NaiveGenerator(loaded, Tokenizer.load(where))
    answers = {}
    for number in range(arguments.questions):
        params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens, top_logprobs=2)
        done = naive.generate(naive.tokenizer.render(question(number)), params)
        margins = [
            abs(first - second) for first, second in (tuple(top.values())[:2] for top in done.top_logprobs or ())
        ]
        if min(margins) >= arguments.margin:
            answers[number] = done.text
    return answers


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Write {number % 7 + 1} facts about the number {number}."}]


def chat(number: int, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "model", "messages": question(number), "temperature": 0, "max_tokens": max_tokens, "stream": True
    }  # fmt: skip


async def read_stream(response: httpx.Response, leave_after: int | None = None) -> tuple[str, str | None, list[float]]:
    """The text, how it ended (a finish reason, "left" or the error's message), and when each piece came."""
    text, end, events, times = "", None, 0, list[float]()
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return text, f"error: {event['error']['message']}", times
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                text += piece
                times.append(time.monotonic())
            end = choice["finish_reason"] or end
        events += 1
        if leave_after is not None and events >= leave_after:
            return text, "left", times
    return text, end, times


KINDS = {"read": 55, "leave": 20, "vanish": 10, "long": 4, "malformed": 4, "key": 4, "field": 3}
"""What a client does next, with its weight; each is a method of `Load`."""


class Load:
    """The clients and what they saw."""

    def __init__(self, url: str, arguments: argparse.Namespace, max_len: int, naive: dict[int, str] | None) -> None:
        self.url, self.arguments, self.max_len = url, arguments, max_len
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.answers: dict[int, str] = dict(naive or {})
        """Greedy answers by the number of the question; all answers to one question must be the same."""
        self.questions = sorted(naive) if naive is not None else list(range(arguments.questions))
        self.num_compared = 0
        self.first_s: list[float] = []
        self.between_s: list[float] = []
        self.whole_s: list[float] = []
        self.deadline = 0.0

    async def run(self) -> None:
        self.deadline = time.monotonic() + self.arguments.seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=600, headers=HEADERS) as client:
            await asyncio.gather(*(self.one_client(client, index) for index in range(self.arguments.clients)))

    async def one_client(self, client: httpx.AsyncClient, index: int) -> None:
        draw = random.Random(index)
        while time.monotonic() < self.deadline:
            kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                await getattr(self, kind)(client, draw)
                self.seen[kind] += 1
            except (httpx.TransportError, httpx.StreamError) as error:
                self.seen[f"{type(error).__name__}"] += 1
                if not self.arguments.kill:
                    self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(draw.uniform(0.1, 0.5))

    async def read(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        number = draw.choice(self.questions)
        started = time.monotonic()
        body = chat(number, self.arguments.max_tokens)
        async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            if await self.turned_away(response, draw):
                return
            text, end, times = await read_stream(response)
        if self.arguments.kill and (end is None or end.startswith("error")):
            self.seen["broken stream"] += 1
            return
        if times:
            self.first_s.append(times[0] - started)
            self.between_s += [late - early for early, late in itertools.pairwise(times)]
        self.whole_s.append(time.monotonic() - started)
        self.num_compared += 1
        if end not in ("stop", "length"):
            self.wrong.append(f"question {number} ended with {end!r}")
        elif self.answers.setdefault(number, text) != text:
            self.wrong.append(f"question {number}: {text!r} where {self.answers[number]!r} was due")

    async def leave(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        body = chat(draw.randrange(10**6), self.arguments.max_tokens)
        async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            if not await self.turned_away(response, draw):
                await read_stream(response, leave_after=draw.randrange(1, 20))

    async def vanish(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        """Ask for a whole answer and go away, often before it has begun."""
        body = chat(draw.randrange(10**6), self.max_len // 2) | {"stream": False, "ignore_eos": True}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(draw.uniform(0, 0.5)):
                response = await client.post(f"{self.url}/v1/chat/completions", json=body)
                await self.turned_away(response, draw)

    async def turned_away(self, response: httpx.Response, draw: random.Random) -> bool:
        """Whether the server was full or stopping, which is an answer too; then wait a little."""
        if response.status_code == 200:
            return False
        await response.aread()
        if response.status_code in (429, 503):
            self.seen[str(response.status_code)] += 1
            await asyncio.sleep(draw.uniform(0.5, 1.5))
        else:
            self.wrong.append(f"status {response.status_code}: {response.text[:200]}")
        return True

    async def long(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        body = {"model": "model", "prompt": [1] * (self.max_len + draw.randrange(1, 1000)), "stream": True}
        await self.expect(client, "/v1/completions", 400, "context_length_exceeded", json=body)

    async def malformed(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        whole = json.dumps(chat(1, 8))
        content = whole[: draw.randrange(1, len(whole))].encode()
        await self.expect(client, "/v1/chat/completions", 400, "invalid_json", content=content)

    async def key(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        wrong = {"authorization": f"Bearer wrong-{draw.random()}"}
        await self.expect(client, "/v1/chat/completions", 401, "invalid_api_key", json=chat(1, 8), headers=wrong)

    async def field(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        body = chat(1, 8) | {"no_such_field": draw.random()}
        await self.expect(client, "/v1/chat/completions", 400, "unsupported_field", json=body)

    async def expect(self, client: httpx.AsyncClient, path: str, status: int, code: str, **more: Any) -> None:
        response = await client.post(self.url + path, **more)
        got = (response.status_code, response.json()["error"]["code"])
        if self.arguments.kill and got[0] == 503:
            return
        if got != (status, code):
            self.wrong.append(f"{path}: {got} where {(status, code)} was due")


def figures(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics", headers=HEADERS, timeout=60).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def settled(url: str) -> dict[str, float]:
    """The figures once nothing runs any more."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        now = figures(url)
        idle = now["qwench_sequences_running"] + now["qwench_sequences_waiting"] == 0
        if (idle and now["qwench_cache_blocks"] == now["qwench_cache_blocks_free"]) or time.monotonic() > deadline:
            return now
        time.sleep(0.1)


def asked_alone(url: str, numbers: list[int], max_tokens: int) -> dict[int, str]:
    """Answers to the same questions, one at a time on the idle server."""
    answers = {}
    for number in numbers:
        body = chat(number, max_tokens) | {"stream": False}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=HEADERS, timeout=600)
        answers[number] = response.json()["choices"][0]["message"]["content"]
    return answers


async def sample_memory(server: ServerProcess, memory: list[tuple[float, float]]) -> None:
    started = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            memory.append((time.monotonic() - started, server.memory_mib()))
        await asyncio.sleep(1.0)


async def kill_often(server: ServerProcess, load: Load, every_s: float) -> int:
    count = 0
    while time.monotonic() + 2 * every_s < load.deadline:
        await asyncio.sleep(every_s)
        server.process.kill()
        server.process.wait()
        await asyncio.to_thread(server.start)
        count += 1
    return count


def slope_mib_per_min(memory: list[tuple[float, float]]) -> float:
    """Growth over the second half of the run, by least squares: the first half fills buffers and caches."""
    half = [(at, size) for at, size in memory if at >= memory[-1][0] / 2]
    if len(half) < 3:
        return 0.0
    times, sizes = zip(*half, strict=True)
    return statistics.linear_regression(times, sizes).slope * 60


async def measure(server: ServerProcess, load: Load) -> tuple[list[tuple[float, float]], int]:
    memory: list[tuple[float, float]] = []
    watcher = asyncio.create_task(sample_memory(server, memory))
    load.deadline = time.monotonic() + load.arguments.seconds
    killer = asyncio.create_task(kill_often(server, load, load.arguments.kill_every)) if load.arguments.kill else None
    try:
        await load.run()
        kills = await killer if killer else 0
    finally:
        watcher.cancel()
    return memory, kills


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """The median, rarer ones and the worst, in seconds."""
    if len(seconds) < 2:
        return None
    cuts = statistics.quantiles(seconds, n=100)
    return {
        "p50": round(cuts[49], 4), "p90": round(cuts[89], 4), "p99": round(cuts[98], 4), "max": round(max(seconds), 4)
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("settings", nargs="*", help="settings of the engine, key=value")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--questions", type=int, default=64, help="different questions of the greedy answers")
    parser.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True, help="compare with it")
    parser.add_argument("--margin", type=float, default=1e-3, help="in log-probability, see above (bf16 needs more)")
    parser.add_argument("--check", type=int, default=16, help="questions asked again alone at the end")
    parser.add_argument("--max-concurrent", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--kill", action="store_true", help="kill and restart the server meanwhile")
    parser.add_argument("--kill-every", type=float, default=10, metavar="S")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model
        if model == "tiny":
            model = str(Path(directory) / "tiny")
            make_tiny(Path(model))
        return measured(model, arguments)


def measured(model: str, arguments: argparse.Namespace) -> int:
    naive = naive_answers(model, arguments) if arguments.naive else None
    if naive is not None and not naive:
        raise SystemExit("every answer hangs on a near tie; lower --margin or --max-tokens")
    server = ServerProcess(model, arguments.settings, arguments.port, arguments.device, arguments.max_concurrent)
    try:
        shown = httpx.get(f"{server.url}/v1/models", headers=HEADERS, timeout=60).json()["data"][0]
        load = Load(server.url, arguments, shown["max_model_len"], naive)
        asked_alone(server.url, [0], 8)  # so that what is built at the first answer is not taken for growth
        before = settled(server.url)
        memory, kills = asyncio.run(measure(server, load))
        after = settled(server.url)
        numbers = sorted(load.answers)[: arguments.check]
        alone = asked_alone(server.url, numbers, arguments.max_tokens)
        differing = [number for number in numbers if alone[number] != load.answers[number]]
        exit_code = server.stop()
    finally:
        if server.process.poll() is None:
            server.process.kill()
    lost = after["qwench_cache_blocks"] - after["qwench_cache_blocks_free"]
    changes = {
        name.removeprefix("qwench_").removesuffix("_total"): int(after[name] - before[name])
        for name in (
            "qwench_prompt_tokens_total", "qwench_cached_prompt_tokens_total", "qwench_generated_tokens_total",
            "qwench_preemptions_total",
        )
    }  # fmt: skip
    result: dict[str, Any] = {
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "events": dict(sorted(load.seen.items())),
        "num_wrong": len(load.wrong),
        "wrong": load.wrong[:20],
        "blocks": {
            "all": after["qwench_cache_blocks"], "free_before": before["qwench_cache_blocks_free"],
            "free_after": after["qwench_cache_blocks_free"],
        },
        "greedy_answers": {
            "compared": load.num_compared, "questions": len(load.questions), "with_naive": naive is not None,
            "left_out_for_near_ties": arguments.questions - len(load.questions),
            "asked_alone": len(numbers), "differing_alone": len(differing),
        },
        "memory_mib": {
            "first": round(memory[0][1]), "last": round(memory[-1][1]), "most": round(max(size for _, size in memory)),
            "slope_per_min": round(slope_mib_per_min(memory), 2),
        },
        "counters": changes,
        "generated_tokens_per_s": round(changes["generated_tokens"] / arguments.seconds, 1),
        "seconds_to_first_text": percentiles(load.first_s),
        "seconds_between_pieces": percentiles(load.between_s),
        "seconds_for_an_answer": percentiles(load.whole_s),
        "kills": kills,
        "exit_code": exit_code,
    }  # fmt: skip
    if arguments.kill:
        del result["generated_tokens_per_s"], result["memory_mib"], result["counters"]  # of several processes
    print(json.dumps(result, indent=2))
    write_result("serve_kill" if arguments.kill else "serve_load", result)
    return int(bool(load.wrong or lost or differing or exit_code or not load.num_compared))


if __name__ == "__main__":
    sys.exit(main())
