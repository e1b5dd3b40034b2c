"""`python -m forge` is `forge`."""

from forge.cli import main

main()
