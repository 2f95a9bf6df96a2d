"""Figures as files, in a style of their own. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moejax.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 150
# Okabe and Ito's palette, told apart with every common form of colour blindness; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Within the block, matplotlib's own defaults: the same figure whatever a matplotlibrc, a style or MPLBACKEND says.

    A notebook leaves a backend in MPLBACKEND that its child processes do not have, and matplotlib looks at it when it is imported.
    """
    given = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        import matplotlib
    finally:
        os.environ.pop("MPLBACKEND")
        if given is not None:
            os.environ["MPLBACKEND"] = given
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as the PNG or PDF that its name says, whole or not at all: the same bytes for the same figure.

    Raises:
        OSError: it cannot be written.
    """
    kind = path.suffix.removeprefix(".")
    metadata = {"pdf": {"CreationDate": None}, "png": {"Software": None}}[kind]
    write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=DOTS_PER_INCH, metadata=metadata))
