"""`python -m pal` is the command `pal`."""

from pal.app.cli import main

main()
