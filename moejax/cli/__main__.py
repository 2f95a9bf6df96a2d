"""`python -m moejax.cli` is the command `moejax`."""

from moejax.cli.program import main

if __name__ == "__main__":  # worker processes import this module again
    main()
