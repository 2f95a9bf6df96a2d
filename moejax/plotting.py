"""Figures of single fits. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def convergence_figure(
    history: np.ndarray, y: np.ndarray, predicted: np.ndarray, share: np.ndarray, units: str, path: Path
) -> None:
    """Two panels: the log-likelihood still to gain at every pass, and observed against predicted labels.

    Args:
        history: (passes,) log-likelihood in nats.
        y: (n,) labels; predicted (n,) E[y | x].
        share: (n,) index of the most responsible expert of each sample.
        units: of the labels.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.0), layout="constrained")
    if history.size:
        gap = np.maximum(history.max() - history, 1e-6)
        left.semilogy(np.arange(1, history.size + 1), gap, marker="o", markersize=3.5, color=PALETTE[0])
    else:
        left.text(0.5, 0.5, "moments only: no iterations", ha="center", va="center", transform=left.transAxes)
    left.set_xlabel("pass over the data")
    left.set_ylabel("log-likelihood below the final one (nats)")
    left.set_title("Convergence")
    left.grid(alpha=0.3)
    for expert in range(int(share.max()) + 1):
        chosen = share == expert
        right.plot(
            predicted[chosen],
            y[chosen],
            ".",
            markersize=4,
            color=PALETTE[expert % len(PALETTE)],
            label=f"expert {expert + 1}",
        )
    ends = [min(y.min(), predicted.min()), max(y.max(), predicted.max())]
    right.plot(ends, ends, color="0.4", linewidth=1, linestyle="--", label="observed = predicted")
    right.set_xlabel(f"predicted E[y | x] ({units})")
    right.set_ylabel(f"observed y ({units})")
    right.set_title("Labels, by their most responsible expert")
    right.legend(fontsize=8, framealpha=0.9)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
