"""`qwench judge ANSWERS...`: a language model rates answers to open questions, or compares those of two models.

    qwench eval MODEL --tasks mt_bench --data-dir DATA --out answers/new
    qwench judge answers/new --judge JUDGE
    qwench judge answers/new --baseline answers/old --judge https://api.example.com/v1 --judge-model NAME

    OUT/judge.json         figures, setting, failures
    OUT/judgements.jsonl   everything that the judge said, one line a judgement
    OUT/requests.jsonl     finished questions to the judge, by which an interrupted run goes on

Engine, remote client and evaluation meet here and nowhere below.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwench.evals.judge import ChatModel, Rating, Verdict
    from qwench.evals.judge_data import Answers, Question

KEY_VARIABLE = "OPENAI_API_KEY"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="qwench judge",
        description="A language model judges answers to open questions: ratings from 1 to 10, or pairs in both orders.",
        epilog="docs/evaluation-report.md tells how figures are made and what to beware of.",
    )
    made.add_argument(
        "answers",
        metavar="ANSWERS",
        type=Path,
        nargs="+",
        help="directories of qwench eval --tasks mt_bench, or JSONL files of MT-Bench's own code",
    )
    made.add_argument(
        "--judge",
        required=True,
        metavar="MODEL|URL",
        help="a model as for qwench eval, or an OpenAI-compatible address",
    )
    made.add_argument(
        "--judge-model", default="", metavar="NAME", help="which model of the address (default: its only one)"
    )
    made.add_argument("--mode", choices=["single", "pairwise"], help="default: single, or pairwise with --baseline")
    made.add_argument(
        "--baseline",
        type=Path,
        metavar="ANSWERS",
        help="pairwise: what all others are compared with (default: all pairs)",
    )
    made.add_argument(
        "--questions", type=Path, metavar="FILE", help="question.jsonl, for answers that come without their questions"
    )
    made.add_argument("--task", default="mt_bench", help="the task whose answers are read (default mt_bench)")
    made.add_argument("--limit", type=int, metavar="N", help="questions at most")
    made.add_argument("--out", type=Path, metavar="DIR", help="default: judgements/JUDGE-...")
    made.add_argument("--max-tokens", type=int, default=2048, help="of a judgement (2048)")
    made.add_argument("--temperature", type=float, default=0.0, help="of the judge (0)")
    made.add_argument(
        "--key-variable",
        default=KEY_VARIABLE,
        metavar="VAR",
        help=f"environment variable with the address's key ({KEY_VARIABLE})",
    )
    made.add_argument("--at-once", type=int, default=8, help="requests in flight to an address (8)")
    made.add_argument("--device", default="auto")
    made.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    made.add_argument(
        "--engine", action="append", default=[], metavar="key=value", help="a setting of the judge's engine"
    )
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if (args.limit is not None and args.limit < 1) or min(args.max_tokens, args.at_once) < 1:
        raise ValueError("--limit, --max-tokens and --at-once are positive")
    mode = args.mode or ("pairwise" if args.baseline is not None else "single")
    if mode == "single" and args.baseline is not None:
        raise ValueError("--baseline is for --mode pairwise; without it ANSWERS may be several")
    if mode == "pairwise" and args.baseline is None and len(args.answers) < 2:
        raise ValueError("pairwise needs two: give further ANSWERS, or --baseline ANSWERS")
    from qwench.evals.finished import Finished
    from qwench.evals.judge import Judge
    from qwench.evals.judge_data import read_questions
    from qwench.run import git_commit, machine, write_atomically
    from qwench.types import SamplingParams

    questions = read_questions(args.questions) if args.questions is not None else None
    answers = _named_apart([_read(path, questions, args) for path in args.answers])
    baseline = _read(args.baseline, questions, args) if args.baseline is not None else None
    if baseline is not None and baseline.model in {one.model for one in answers}:
        baseline = dataclasses.replace(baseline, model=f"{baseline.model} (baseline)")
    started = time.perf_counter()
    with open_judge(args) as (model, name, identity):
        out = args.out or Path("judgements") / f"{_file_name(name)}-{_file_name(answers[0].model)}-{mode}"
        params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
        with Finished(out / "requests.jsonl") as finished:
            judge = Judge(model, name, params, finished, identity)
            if mode == "single":
                judged, figures = _single(judge.rate(answers))
            else:
                pairs = [(one, baseline) for one in answers] if baseline else list(itertools.combinations(answers, 2))
                verdicts = [verdict for one, two in pairs for verdict in judge.compare(one, two)]
                judged, figures = _pairwise(verdicts, (baseline or answers[0]).model)
    result = {
        "mode": mode,
        "judge": name,
        "setting": {
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
            "task": args.task,
            "limit": args.limit,
        },
        "answers": {
            one.model: {"questions": len(one.answers)} for one in [*answers, *([baseline] if baseline else [])]
        },
        **figures,
        "seconds": round(time.perf_counter() - started, 3),
        "command": shlex.join(sys.argv),
        "commit": git_commit(),
        "machine": machine(),
    }
    lines = [json.dumps(dataclasses.asdict(entry), ensure_ascii=False) + "\n" for entry in judged]
    write_atomically(out / "judgements.jsonl", "".join(lines))
    write_atomically(out / "judge.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    show(result)
    print(f"judgements: {out}")
    if all(entry.failure for entry in judged):
        raise ValueError(f"not one of {len(judged)} judgements could be read; look at {out / 'judgements.jsonl'}")
    return 0


def _read(path: Path, questions: dict[str, Question] | None, args: argparse.Namespace) -> Answers:
    from qwench.evals.judge_data import read_answers

    answers = read_answers(path, questions, args.task)
    return answers if args.limit is None else answers.first(args.limit)


def _named_apart(answers: Sequence[Answers]) -> list[Answers]:
    """Answers of the same model twice are numbered."""
    seen: dict[str, int] = {}
    found = []
    for one in answers:
        seen[one.model] = seen.get(one.model, 0) + 1
        found.append(
            one if seen[one.model] == 1 else dataclasses.replace(one, model=f"{one.model} ({seen[one.model]})")
        )
    return found


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:60].strip("_.") or "judge"


@contextmanager
def open_judge(args: argparse.Namespace) -> Iterator[tuple[ChatModel, str, str]]:
    """The judge, its name, and what tells it from all others."""
    if args.judge.startswith(("http://", "https://")):
        from qwench.remote import RemoteChat

        remote = RemoteChat(args.judge, args.judge_model, os.environ.get(args.key_variable, ""), at_once=args.at_once)
        yield remote, remote.model, f"{remote.base} {remote.model}"
        return
    if args.judge_model:
        raise ValueError("--judge-model names a model of an address; --judge is a model here")
    from qwench import config
    from qwench.engine import Engine
    from qwench.engine.config import EngineConfig
    from qwench.evals.judge import LocalChat
    from qwench.run import console

    with console.status(f"loading {args.judge}"):
        engine = Engine(args.judge, args.device, args.dtype, None, config.load(EngineConfig, args.engine))
    with engine:
        if engine.tokenizer.chat_format is None:
            raise ValueError(f"{args.judge} has no chat template; a judge has to be a chat model")
        weight = engine.model.model.embed_tokens.weight
        name = Path(args.judge).name or args.judge
        yield LocalChat(engine), name, f"{Path(args.judge).resolve()} {weight.dtype} {engine.tokenizer.fingerprint}"


# ------------------------------------------------------------------------------------------------------------- figures
def _single(ratings: list[Rating]) -> tuple[list[Rating], dict[str, Any]]:
    from qwench.evals.judge import failures, rating_summary

    return ratings, {"ratings": rating_summary(ratings), "judgements": len(ratings), "failures": failures(ratings)}


def _pairwise(verdicts: list[Verdict], anchor: str) -> tuple[list[Verdict], dict[str, Any]]:
    from qwench.evals.judge import failures, games_of
    from qwench.evals.ratings import bradley_terry, length_controlled, win_rate

    games, orders = games_of(verdicts)
    if not verdicts:
        raise ValueError("no question is answered by both sides; answer the same questions")
    pairs = []
    for first, second in dict.fromkeys((game.first, game.second) for game in games):
        mine = [game for game in games if (game.first, game.second) == (first, second)]
        controlled = length_controlled(mine)
        pairs.append(
            {
                "first": first,
                "second": second,
                "games": len(mine),
                "wins": sum(game.outcome == 1 for game in mine),
                "ties": sum(game.outcome == 0.5 for game in mine),
                "losses": sum(game.outcome == 0 for game in mine),
                "win_rate": dataclasses.asdict(win_rate(mine)),
                "first_characters": sum(game.first_length for game in mine) / len(mine),
                "second_characters": sum(game.second_length for game in mine) / len(mine),
                "length_controlled": None
                if controlled is None
                else {"win_rate": controlled[0], "odds_of_longer": controlled[1]},
            }
        )
    ratings = (
        {name: dataclasses.asdict(rating) for name, rating in bradley_terry(games, anchor).items()} if games else {}
    )
    found = {
        "pairs": pairs,
        "ratings": ratings,
        "orders": orders,
        "judgements": len(verdicts),
        "failures": failures(verdicts),
    }
    return verdicts, found


def show(result: dict[str, Any]) -> None:
    """The tables of a judging."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if result["mode"] == "single":
        table = Table(title=f"rated by {escape(result['judge'])}, 1 to 10")
        for name in ("model", "mean", "turn 1", "turn 2", "judgements", "failed"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for name, found in result["ratings"].items():
            error = "" if found["stderr"] is None else f" ± {found['stderr']:.2f}"
            turns = [_number(found["by_turn"].get(turn)) for turn in ("1", "2")]
            failed = sum(found["failures"].values())
            table.add_row(escape(name), f"{_number(found['mean'])}{error}", *turns, f"{found['n']}", f"{failed}")
        console.print(table)
        for name, found in result["ratings"].items():
            told = ", ".join(f"{category} {_number(mean)}" for category, mean in found["by_category"].items())
            console.print(f"{name}: {told}", highlight=False, markup=False)
    else:
        table = Table(title=f"compared by {escape(result['judge'])}, each pair in both orders")
        for name in ("first", "second", "win / tie / loss", "win rate", "at equal length", "characters"):
            table.add_column(name, justify="left" if name in ("first", "second") else "right")
        for pair in result["pairs"]:
            rate, controlled = pair["win_rate"], pair["length_controlled"]
            table.add_row(
                escape(pair["first"]),
                escape(pair["second"]),
                f"{pair['wins']} / {pair['ties']} / {pair['losses']}",
                f"{rate['value']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})",
                "" if controlled is None else f"{controlled['win_rate']:.1%}",
                f"{pair['first_characters']:,.0f} / {pair['second_characters']:,.0f}",
            )
        console.print(table)
        ratings = sorted(result["ratings"].items(), key=lambda item: -item[1]["value"])
        for name, rating in ratings if len(ratings) > 2 else ():
            told = f"{name}: {rating['value']:.0f} ({rating['low']:.0f} to {rating['high']:.0f}) on the Elo scale"
            console.print(told, highlight=False, markup=False)
        orders = result["orders"]
        told = f"both orders agreed {orders['agreed']} times and disagreed {orders['disagreed']} times "
        told += f"(first place twice {orders['first place twice']}, second place twice {orders['second place twice']})"
        console.print(told, highlight=False)
    if failed := sum(result["failures"].values()):
        console.print(f"[yellow]{failed} of {result['judgements']} judgements could not be read:[/]")
        for reason, count in result["failures"].items():
            console.print(f"  {count} x {reason}", highlight=False, markup=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
