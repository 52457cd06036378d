"""`qwench chat MODEL`: a conversation in the terminal. Answers stream; Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from qwench.engine.config import EngineConfig
from qwench.engine.engine import Engine
from qwench.ops.hardware import pick_device, pick_dtype
from qwench.types import Message, SamplingParams

HELP = """/system TEXT   set the system prompt and start anew     /clear   forget the conversation
/retry         answer the last question again           /stats   speed after each answer, on or off
/quit          leave (also Ctrl-D)                       Ctrl-C   stop the answer; it stays in the conversation"""

err = Console(stderr=True, highlight=False)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="qwench chat", description=__doc__)
    parser.add_argument("model", help="Hugging Face directory or hub id, GGUF file, or qwench run")
    parser.add_argument("--tokenizer", help="tokenizer to use instead of the model's own")
    parser.add_argument("--system", help="system prompt (default: the chat format's own)")
    parser.add_argument("--prompt", action="append", help="ask this and leave; may be given several times, as turns")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--repetition-penalty", type=float, default=1.05)
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer, in tokens")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: bfloat16 where the processor multiplies it natively, else float32",
    )
    args = parser.parse_args(argv)
    params = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    started = time.perf_counter()
    with err.status(f"loading {escape(args.model)}"):
        dtype = pick_dtype("auto", pick_device(args.device)) if args.dtype == "auto" else args.dtype
        engine = Engine(args.model, args.device, dtype, args.tokenizer, EngineConfig(max_seqs=1))
    err.print(f"[dim]loaded in {time.perf_counter() - started:.1f} s; /help lists the commands[/]")
    with engine:
        chat = Chat(engine, params, args.system)
        if not args.prompt:
            return chat.loop()
        for prompt in args.prompt:
            chat.ask(prompt)
    return 0


class Chat:
    """One conversation: its messages, and how answers are printed."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None, out: TextIO | None = None) -> None:
        """`out` is where answers go, stdout by default."""
        self.engine, self.params, self.system, self.out = engine, params, system, out or sys.stdout
        self.show_stats = True
        self.messages: list[Message] = []
        self.clear()

    def clear(self) -> None:
        self.messages = [Message(role="system", content=self.system)] if self.system is not None else []

    def ask(self, text: str) -> str:
        """Add a question, stream the answer to `out`, and return it. A question that fails is not kept."""
        question = Message(role="user", content=text)
        prompt = self.engine.tokenizer.render([*self.messages, question])
        answer, num_tokens, first, started = "", 0, None, time.perf_counter()
        try:
            with closing(self.engine.stream(prompt, self.params)) as pieces:  # Ctrl-C frees the answer's cache
                for chunk in pieces:
                    first = first or time.perf_counter()
                    answer += chunk.text
                    self.out.write(chunk.text)
                    self.out.flush()
                    num_tokens += len(chunk.token_ids)
        except KeyboardInterrupt:
            err.print("\n[dim](stopped)[/]", end="")
        self.out.write("\n")
        self.messages += [question, Message(role="assistant", content=answer)]
        if self.show_stats and first is not None:
            self._print_stats(len(prompt), num_tokens, first - started, time.perf_counter() - first)
        return answer

    def _print_stats(self, num_prompt: int, num_tokens: int, to_first_s: float, after_s: float) -> None:
        speed = f", then {(num_tokens - 1) / after_s:.1f} tokens/s" if num_tokens > 1 and after_s > 0 else ""
        err.print(f"[dim]{num_prompt} tokens read, first answer after {to_first_s:.2f} s{speed}[/]")

    def loop(self) -> int:
        while True:
            try:
                line = input("\n> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                err.print("[dim](Ctrl-D or /quit leaves)[/]")
                continue
            if line in ("/quit", "/exit"):
                return 0
            if line.startswith("/"):
                self._command(*line.partition(" ")[::2])
            elif line:
                self._ask_safely(line)

    def _ask_safely(self, text: str) -> None:
        try:
            self.ask(text)
        except ValueError as error:
            err.print(f"[red]{escape(str(error))}[/]")

    def _command(self, name: str, rest: str) -> None:
        if name == "/system":
            self.system = rest.strip()
            self.clear()
        elif name == "/clear":
            self.clear()
        elif name == "/stats":
            self.show_stats = not self.show_stats
        elif name == "/retry":
            questions: Sequence[int] = [i for i, m in enumerate(self.messages) if m.role == "user"]
            if questions:
                text = self.messages[questions[-1]].content
                self.messages = self.messages[: questions[-1]]
                self._ask_safely(text)
        else:
            err.print(HELP)
