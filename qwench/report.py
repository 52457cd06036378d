"""`qwench report DIR`: one offline HTML page of what a command has left in a directory.

Which page it is, the directory's files tell: a training run (`train.report`), a run of `qwench data`
(`data.pipeline.report`), or an evaluation (`evals.report`), which can be shown beside a second one.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="qwench report",
        description="DIR/report.html: curves, profile and recipe of a training run; what was read, dropped and mixed "
        "by qwench data; scores, settings and every sample of qwench eval, beside a second evaluation if one is given.",
    )
    parser.add_argument("run", metavar="DIR", type=Path, help="what a command wrote to (its out)")
    parser.add_argument(
        "--baseline", metavar="DIR", type=Path, help="of an evaluation: a second one to compare it with"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="of an evaluation: the page (default: DIR/report.html)"
    )
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        raise ValueError(f"there is no directory {args.run}; give what a command wrote to (its out)")
    from qwench.evals.run_files import is_eval_run

    if is_eval_run(args.run):
        from qwench.evals import report

        path = report.write_report(args.run, args.baseline, args.out)
    elif args.baseline is not None or args.out is not None:
        raise ValueError(f"{args.run} holds no evaluation (results.json), and --baseline and --out are for those alone")
    else:
        path = _report_of_work(args.run)
    print(f"report: {path}")
    return 0


def _report_of_work(run: Path) -> Path:
    from qwench.data.pipeline import report as data_report

    if data_report.is_data_run(run):
        return data_report.write_report(run)
    from qwench.train import report as train_report

    return train_report.write_report(run)
