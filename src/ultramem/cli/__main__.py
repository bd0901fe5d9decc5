"""`python -m ultramem.cli` is the `ultramem` command."""

from ultramem.cli import main

main()
