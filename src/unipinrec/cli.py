"""The `unipinrec` command. Subcommands import what they need when they run, so serving never imports torch."""

from __future__ import annotations

import click

from unipinrec import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train, export and serve a recommender that retrieves and ranks with one transformer."""
