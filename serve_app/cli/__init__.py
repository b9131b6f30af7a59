"""The `wan-serve` command, one file per group of commands."""

from serve_app.cli.serve import cli, main

__all__ = ["cli", "main"]
