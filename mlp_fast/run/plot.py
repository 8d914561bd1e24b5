"""The loss curves of a run as a picture; needs matplotlib."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlp_fast.errors import UserError
from mlp_fast.files import check_writable

if TYPE_CHECKING:
    from mlp_fast.run.log import Evaluation

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: str) -> None:
    """Raises UserError where a plot could not be written to this file, before a long run rather than after it."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    check_writable(Path(path), "--plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--plot needs matplotlib; install it with: pip install 'mlp-fast[plot]'") from None
    except OSError as error:
        raise UserError(f"--plot: {' '.join(str(error).split())}") from None


def drawable(text: str) -> str:
    """A text for a picture: characters that the font lacks, or that cannot be seen, as their code points."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    return "".join(c if c.isprintable() and ord(c) in glyphs else f"U+{ord(c):04X}" for c in text)


def draw_losses(path: str, evaluations: Sequence["Evaluation"], title: str, floor: float | None) -> None:
    """Draws train and val loss over the steps, and the floor where the corpus has one. OSError where that fails."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    steps = [e.step for e in evaluations]
    axes.plot(steps, [e.train_loss for e in evaluations], label="train")
    axes.plot(steps, [e.val_loss for e in evaluations], label="val")
    if floor is not None:
        axes.axhline(floor, color="grey", linestyle="--", label="floor (entropy of the source on val)")
    axes.set_title(textwrap.fill(drawable(title), 60), parse_math=False)
    axes.set(xlabel="step", ylabel="mean cross-entropy (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)
