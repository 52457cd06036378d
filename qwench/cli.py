"""The `qwench` command: a table of subcommands. A stage's module is imported only when it is chosen."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    main: str
    """module:function that takes the remaining arguments and returns an exit code."""
    help: str


COMMANDS = {
    "demo": Command("qwench.demo.command:main", "the whole recipe at small size on this machine, and its report"),
    "tokenizer": Command(
        "qwench.tokenizer.commands:main", "train, import and inspect tokenizers; encode text to shards"
    ),
    "tokenizer encode": Command("qwench.data.encode:main", ""),
    "data": Command("qwench.data.pipeline.command:main", "documents to clean, deduplicated, mixed token shards"),
    "mixture": Command("qwench.train.mixture_proxy:main", "shares for a mixture, from small models on variants"),
    "classifier": Command(
        "qwench.data.classifier_command:main", "train, apply and measure scorers of text: quality, safety, domain"
    ),
    "classifier label": Command("qwench.engine.label_command:main", ""),
    "pretrain": Command("qwench.train.pretrain:main", "next-token training on token shards"),
    "plan": Command("qwench.train.plan_command:main", "memory, operations and layout of a pretraining recipe"),
    "sft": Command("qwench.train.sft:main", "supervised fine-tuning on conversations"),
    "report": Command(
        "qwench.report:main", "report.html of a training run, a data run, or an evaluation with every sample"
    ),
    "follow": Command("qwench.train.trackers:main", "give a run's records to TensorBoard, wandb or trackio"),
    "eval": Command("qwench.evaluate:main", "measure a model on benchmarks, with the setting beside the score"),
    "judge": Command("qwench.judge:main", "a language model rates or compares answers to open questions"),
    "chat": Command("qwench.engine.chat:main", "talk to a model in the terminal"),
    "serve": Command("qwench.serve.command:main", "OpenAI-compatible server, with a chat page"),
    "convert": Command("qwench.model.convert:main", "Hugging Face, Qwen-1, GGUF and run checkpoints into each other"),
    "doctor": Command("qwench.doctor:main", "what this machine can do, and what qwench would choose"),
    "config": Command("qwench.cli:config_main", "show the defaults of a stage as commented TOML"),
}

SCHEMAS = {
    "pretrain": "qwench.train.config:PretrainConfig",
    "sft": "qwench.train.config:SFTConfig",
    "data": "qwench.data.pipeline.recipe:DataConfig",
    "mixture": "qwench.train.mixture_proxy:MixtureProxyConfig",
    "demo": "qwench.demo.config:DemoConfig",
    "model": "qwench.model.config:ModelConfig",
}


def share_the_processor() -> None:
    """Let idle threads of a parallel region sleep soon instead of spinning, unless the user has chosen otherwise.

    On a machine that does anything else at the same time, spinning costs more than it saves (measured on 2 cores beside
    one busy process: 0.93 s a training pass against 0.57 s; no difference on an idle machine). libgomp reads this when
    torch is loaded, so it comes before any stage is imported.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # weights on large pages: 6 % faster to read on a CPU


def load_function(path: str) -> Callable[..., int]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items() if command.help]
    return "\n".join(
        [
            "usage: qwench COMMAND [ARGUMENTS]",
            "",
            "The whole Qwen recipe in one codebase: from raw documents to a chat model.",
            "",
            *lines,
            "",
            "qwench COMMAND --help tells more. QWENCH_DEBUG=1 shows a traceback where an error is one line.",
        ]
    )


def config_main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] != "show" or argv[1] not in SCHEMAS:
        wanted = argv not in ([], ["-h"], ["--help"])
        print(f"usage: qwench config show {{{','.join(SCHEMAS)}}}", file=sys.stderr if wanted else sys.stdout)
        return 2 if wanted else 0
    from qwench import config

    module, _, name = SCHEMAS[argv[1]].partition(":")
    print(config.describe(getattr(importlib.import_module(module), name)), end="")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from qwench import __version__

        print(f"qwench {__version__}")
        return 0
    two_words = " ".join(arguments[:2])
    name = two_words if two_words in COMMANDS else arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [n for n in COMMANDS if " " not in n], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "qwench --help lists them"
        print(f"qwench: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    share_the_processor()
    try:
        code = load_function(COMMANDS[name].main)(arguments[len(name.split()) :])
        sys.stdout.flush()  # here, where a reader that went away is still one line and not a traceback
        return code
    except KeyboardInterrupt:
        print("qwench: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("QWENCH_DEBUG"):
            raise
        print(f"qwench: {explain(error)}", file=sys.stderr)
        return 2


def explain(error: Exception) -> str:
    """One message for an expected failure: what, where, what to do."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it ends
        return "the reader of the output went away"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return (
            f"the disk is full{where}; what was saved before is intact. Free some space and run the same command again"
        )
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror or type(error).__name__}: {error.filename}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
