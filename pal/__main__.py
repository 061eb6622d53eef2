"""`python -m pal` is the command `pal`."""

from pal.app.cli import main

if __name__ == "__main__":
    # worker processes import this module again under another name
    main()
