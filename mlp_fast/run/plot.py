"""Pictures of losses and of times; they need matplotlib."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlp_fast.errors import UserError, one_line
from mlp_fast.files import check_writable
from mlp_fast.measure.timing import Spread

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: str) -> None:
    """Raises UserError where a plot could not be written to this file, before a long run rather than after it."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    check_writable(Path(path), "--plot")
    require_matplotlib("--plot needs")


def require_matplotlib(wanted: str) -> None:
    """UserError where matplotlib cannot be imported; the message begins with `wanted`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f"{wanted} matplotlib; install it with: pip install 'mlp-fast[plot]'") from None
    except OSError as error:
        raise UserError(f"{wanted.partition(' ')[0]}: {one_line(error)}") from None


def drawable(text: str) -> str:
    """A text for a picture: characters that the font lacks, or that cannot be seen, as their code points."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    return "".join(c if c.isprintable() and ord(c) in glyphs else f"U+{ord(c):04X}" for c in text)


@contextlib.contextmanager
def figure(
    path: Path, width: float = 6.4, height: float = 4.8, metadata: Mapping[str, str | None] | None = None, **grid: Any
) -> Iterator[Any]:
    """The axes of a picture that is saved at the end of the block. OSError where that fails.

    Args:
        width, height: of the picture, in inches.
        metadata: written into the file.
        grid: nrows and ncols of an array of axes; without them it is one.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    yield picture.subplots(**grid)
    picture.savefig(path, dpi=130, metadata=metadata)


def draw_losses(axes: Any, steps: Sequence[int], losses: Mapping[str, Sequence[float]], entropy: float | None) -> None:
    """Draws losses (name -> nats, one for each of the steps) as curves, and the entropy of val where it is known."""
    for name, values in losses.items():
        axes.plot(steps, values, label=name)
    if entropy is not None:
        axes.axhline(entropy, color="grey", linestyle="--", label="entropy of the source, on val")
    axes.set(xlabel="step", ylabel="mean cross-entropy (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_times(axes: Any, times: Mapping[str, Spread], bounds: Mapping[str, float] | None = None) -> None:
    """Draws times (name -> ms per step) as bars, the first on top, with the fastest and the slowest round.

    Lower bounds, where they are given, are marks in the bars, and the axis is logarithmic.
    """
    names, spreads = list(times)[::-1], list(times.values())[::-1]
    medians = [spread.median for spread in spreads]
    whiskers = [[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]]
    bars = axes.barh(names, medians, xerr=whiskers, capsize=3, color="lightsteelblue")
    axes.bar_label(bars, [f" {median:.3g}" for median in medians])
    axes.set(xlabel="ms per step (median; whiskers: fastest and slowest round)")
    if bounds:
        axes.plot(list(bounds.values()), list(bounds), "k|", markersize=14, mew=2, label="lower bound")
        axes.set(xscale="log")
        axes.set_xlim(right=2 * max(spread.max for spread in spreads))  # room for the labels
        axes.xaxis.set_major_formatter("{x:g}")
