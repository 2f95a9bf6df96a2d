"""`python -m moejax` is the command `moejax`."""

from __future__ import annotations

from moejax.cli.program import main

if __name__ == "__main__":  # worker processes import this module again
    main()
