"""The `unipinrec` command. Subcommands import their modules when they run, so serving never imports torch.

common.py          shared by all subcommands
compile.py         `unipinrec compile`
demo.py            `unipinrec demo`
doctor.py          `unipinrec verify` and `unipinrec doctor`
evaluate.py        `unipinrec evaluate`, the printed form of an evaluation, and `unipinrec recommend-all`
export.py          `unipinrec export` and `unipinrec push`
index.py           `unipinrec index`
plan.py            `unipinrec plan`
plan_report.py     the report of `unipinrec plan`
prepare.py         `unipinrec prepare`
prepare_report.py  the report of `unipinrec prepare`
recommend.py       `unipinrec recommend`, and the options of a request and of a device
serve.py           `unipinrec serve` and `unipinrec state`
train.py           `unipinrec train`
"""

from __future__ import annotations

import os

import click

from unipinrec import __version__
from unipinrec.cli.common import Commands
from unipinrec.cli.compile import compile_engines
from unipinrec.cli.demo import demo
from unipinrec.cli.doctor import doctor, verify
from unipinrec.cli.evaluate import evaluate, recommend_all
from unipinrec.cli.export import export, push
from unipinrec.cli.index import index
from unipinrec.cli.plan import plan
from unipinrec.cli.prepare import prepare
from unipinrec.cli.recommend import recommend
from unipinrec.cli.serve import serve, state
from unipinrec.cli.train import train


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__)
def main() -> None:
    """Train, export and serve a recommender that retrieves and ranks with one transformer.

    A BUNDLE to read is a folder, or hf://org/name[@revision] on the Hugging Face Hub.
    """
    # OpenMP reads this when torch loads it. Otherwise its threads spin for milliseconds at each barrier.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


for subcommand in (prepare, train, evaluate, export, compile_engines, verify, recommend, recommend_all, serve, state):
    main.add_command(subcommand)
for tool in (doctor, index, plan, demo, push):
    main.add_command(tool)
