"""The `unipinrec` command. Subcommands import what they need when they run, so serving never imports torch.

common.py          what every subcommand shares
compile.py         `unipinrec compile`
demo.py            `unipinrec demo`
doctor.py          `unipinrec doctor`
evaluate.py        `unipinrec evaluate`, and how an evaluation is printed
export.py          `unipinrec export`
index.py           `unipinrec index`
plan.py            `unipinrec plan`
plan_report.py     what `unipinrec plan` says
prepare.py         `unipinrec prepare`
prepare_report.py  what `prepare` says about the data set that it wrote, for people and for machines
recommend.py       `unipinrec verify` and `unipinrec recommend`
serve.py           `unipinrec serve`
train.py           `unipinrec train`
"""

from __future__ import annotations

import os

import click

from unipinrec import __version__
from unipinrec.cli.compile import compile_engines
from unipinrec.cli.demo import demo
from unipinrec.cli.doctor import doctor
from unipinrec.cli.evaluate import evaluate
from unipinrec.cli.export import export
from unipinrec.cli.index import index
from unipinrec.cli.plan import plan
from unipinrec.cli.prepare import prepare
from unipinrec.cli.recommend import recommend, verify
from unipinrec.cli.serve import serve
from unipinrec.cli.train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train, export and serve a recommender that retrieves and ranks with one transformer."""
    # Read when torch loads OpenMP, whose threads would spin for milliseconds at each barrier for one without a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


for subcommand in (
    prepare,
    train,
    evaluate,
    export,
    compile_engines,
    verify,
    recommend,
    serve,
    doctor,
    index,
    plan,
    demo,
):
    main.add_command(subcommand)
