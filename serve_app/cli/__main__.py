"""`python -m serve_app.cli` is `wan-serve`."""

from serve_app.cli import main

main()
