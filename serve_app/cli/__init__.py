"""The `wan-serve` command, one file per group of commands."""

from serve_app.cli.command import cli, main

__all__ = ["cli", "main"]
