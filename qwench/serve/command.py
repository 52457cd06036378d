"""`qwench serve MODEL`: an OpenAI-compatible server, and a chat page at its address."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from qwench.engine import Engine

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
KEYS_VARIABLE = "QWENCH_API_KEYS"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

err = Console(stderr=True, highlight=False)


def main(argv: list[str]) -> int:
    started = time.perf_counter()
    args = _parser().parse_intermixed_args(argv)  # settings may stand before and after options
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"the server needs {', '.join(missing)}; install it with: pip install 'qwench[serve]'")
    from qwench.serve.limits import ServeConfig, key_digest
    from qwench.serve.server import Server, bind, url_of

    keys = read_keys(args.api_key, args.api_key_file)
    settings = ServeConfig(
        model_names=tuple(args.served_model_name or [name_of(args.model)]),
        api_key_digests=tuple(key_digest(key) for key in keys),
        allowed_hosts=allowed_hosts(args.host, args.allow_host),
        max_concurrent=args.max_concurrent,
        max_body_bytes=args.max_body_bytes,
        request_timeout_s=args.request_timeout,
        drain_timeout_s=args.drain_timeout,
    )
    if not keys and not is_loopback(args.host):
        err.print(
            f"[yellow]warning:[/] {escape(args.host)} can be reached from other machines and no API key is set; "
            f"anyone there can use the model. Set {KEYS_VARIABLE} or --api-key-file"
        )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=args.log_level.upper())
    bound = bind(args.host, args.port)
    with err.status(f"loading {escape(args.model)}"):
        from qwench.model.checkpoint import read_generation_config  # loads PyTorch
        from qwench.serve.app import create_app
        from qwench.serve.params import SamplingDefaults

        defaults = SamplingDefaults.from_generation_config(read_generation_config(args.model))
        engine = open_engine(args)
    url = url_of(bound, args.host)

    def ready() -> None:
        names = ", ".join(settings.model_names)
        print(f"qwench serve: {names} ready after {time.perf_counter() - started:.1f} s", flush=True)
        print(f"chat page {url}/   API {url}/v1   Ctrl-C stops", flush=True)

    try:
        Server(create_app(engine, settings, defaults), ready).run(sockets=[bound])
    finally:
        engine.close()
    return 0


def open_engine(args: argparse.Namespace) -> Engine:
    """The engine with its own settings: the one place where the command's key=value arguments go."""
    from qwench import config
    from qwench.engine import Engine
    from qwench.engine.config import EngineConfig

    return Engine(args.model, args.device, args.dtype, args.tokenizer, config.load(EngineConfig, args.settings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwench serve",
        description="Answer OpenAI's HTTP API with a model, and show a chat page at the same address.",
        epilog="docs/serving.md describes routes, fields and limits, qwench/engine/config.py the engine's settings.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or hub id, GGUF file, or qwench run")
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        help="settings of the engine, for example max_seqs=64 cache_tokens=200000",
    )
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    network.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    network.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="name that browsers may use for this server, where it listens on this machine only and a proxy stands "
        "before it; may be given several times",
    )
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="accept this key; may be given several times. Other users of the machine can see it in the list of "
        f"processes: rather set {KEYS_VARIABLE} (separated by commas) or use --api-key-file",
    )
    access.add_argument("--api-key-file", type=Path, metavar="FILE", help="accept the keys in this file, one a line")
    access.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name of the model in requests (default: that of its file or directory); may be given several times",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-concurrent",
        type=int,
        default=256,
        metavar="N",
        help="answers in the making at once; more get a 429 (default 256)",
    )
    limits.add_argument(
        "--max-body-bytes", type=int, default=16 * 2**20, metavar="N", help="largest body of a request (default 16 MiB)"
    )
    limits.add_argument(
        "--request-timeout", type=float, default=600, metavar="S", help="seconds that a request may take (default 600)"
    )
    limits.add_argument(
        "--drain-timeout",
        type=float,
        default=30,
        metavar="S",
        help="seconds that running requests have after SIGTERM or Ctrl-C (default 30)",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="numbers of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    model.add_argument("--tokenizer", help="tokenizer to use instead of the model's own")
    parser.add_argument(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="what to log; info (the default) writes a line for each request",
    )
    return parser


def read_keys(given: list[str] | None, file: Path | None) -> list[str]:
    """The accepted keys from the command line, the environment and a file. Raises ValueError, never showing a key."""
    keys = list(given or ())
    keys += [key for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [line for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ValueError(f"{file} holds no key; write one a line")
        keys += found
    keys = [key.strip() for key in keys]
    if any(re.fullmatch(r"[!-~]+", key) is None for key in keys):
        raise ValueError("an API key is empty or has blanks or characters outside ASCII; choose another one")
    return keys


def name_of(model: str) -> str:
    """What requests call a model: a hub id as it is, else the name of the file or directory, never its whole path."""
    path = Path(model).expanduser()
    if path.exists():
        return path.resolve().name.removesuffix(".gguf") or "model"
    return model


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_hosts(host: str, named: list[str] | None) -> tuple[str, ...]:
    """Names in the Host header that are accepted; none means any.

    A server for this machine only refuses foreign names, or else a page of another site, whose name was made to
    lead here, could read its answers.
    """
    if named:
        return tuple(dict.fromkeys([*LOOPBACK_NAMES, *(name.lower() for name in named)]))
    return tuple(dict.fromkeys([*LOOPBACK_NAMES, host])) if is_loopback(host) else ()
