"""`python -m moejax` is the command `moejax`."""

from moejax.cli import main

main()
