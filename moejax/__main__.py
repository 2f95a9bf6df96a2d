"""`python -m moejax` is the command `moejax`."""

from moejax.cli import main

if __name__ == "__main__":  # worker processes import this module again
    main()
