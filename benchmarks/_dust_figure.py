"""Figure of the disc behind dust: slices of ε, extinction, and the sky at 3.25 kpc before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import RESULTS

__all__ = ["draw"]


def draw(source: Path, target: Path | None = None) -> Path:
    """Draw what `benchmarks._dust_disc` left; the figure's path."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    data = np.load(source)
    x = data["x"]
    layer = x.shape[2] // 2
    fig, axes = plt.subplots(3, 3, figsize=(13, 10), constrained_layout=True)
    extent = (x[0, 0, 0, 0], x[-1, 0, 0, 0], x[0, 0, 0, 1], x[0, -1, 0, 1])
    tall = (x[0, 0, 0, 0], x[-1, 0, 0, 0], x[0, 0, 0, 2], x[0, 0, -1, 2])
    middle = x.shape[1] // 2
    for row, (cut, box, names) in enumerate(
        (
            (np.s_[:, :, layer], extent, ("x [kpc]", "y [kpc]")),
            (np.s_[:, middle, :], tall, ("x [kpc]", "z [kpc]")),
        )
    ):
        hidden = ~np.isfinite(data["efficiency"][cut])
        for column, (name, title) in enumerate(
            (("efficiency", "ε found"), ("truth", "ε, truth"), ("loss", "−2.5 ∂log ε/∂s [mag/kpc]"))
        ):
            values = np.ma.masked_where(hidden, data[name][cut])
            limits = (0, 1) if column < 2 else (0, 3)
            axis = axes[row, column]
            shown = axis.imshow(values.T, origin="lower", extent=box, vmin=limits[0], vmax=limits[1])
            axis.set(title=title, xlabel=names[0], ylabel=names[1], aspect="equal")
            fig.colorbar(shown, ax=axis, shrink=0.8)
    top = np.percentile(data["true_sky"], 99)
    for axis, name, title in zip(
        axes[2], ("before", "after", "true_sky"), ("seen", "corrected by 1/ε", "truth"), strict=True
    ):
        shown = axis.imshow(
            data[name].T, origin="lower", extent=(-180, 180, -30, 30), vmin=0, vmax=top, aspect="auto"
        )
        axis.set(title=f"stars per deg² at 3.25 kpc, {title}", xlabel="l [deg]", ylabel="b [deg]")
        fig.colorbar(shown, ax=axis, shrink=0.8)
    target = target or RESULTS / "dust.png"
    fig.savefig(target, dpi=80)
    plt.close(fig)
    return target
