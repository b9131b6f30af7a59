"""`python -m cluster.dev`."""

from cluster.dev.commands import main

main()
