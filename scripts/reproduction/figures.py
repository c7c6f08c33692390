"""The paper's figures from its numbers and from what was measured: `draw("1", sources)`, `save(figure, path)`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from crosslore_eval.errors import unknown_name
from reproduction import drawings, motivation
from reproduction.panels import Sources
from reproduction.results import ResultError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWINGS: dict[str, "Callable[[Sources], Figure]"] = {
    "1": drawings.figure_1,
    "2a": motivation.time_split,
    "2b": motivation.subspace_error,
    "3": partial(drawings.residual_figure, "3"),
    "4": partial(drawings.residual_figure, "4"),
}
NEEDS = 'figures need matplotlib, which is not installed. Run: pip install "crosslore[eval]"'


def draw(number: str, sources: Sources) -> "Figure":
    """Return a figure of the paper: "1", "2a", "2b", "3" or "4".

    Raises:
        ResultError: if matplotlib or a file of the benchmark suite is missing.
        ValueError: if there is no such figure.
    """
    if number not in DRAWINGS:
        raise unknown_name("figure", number, DRAWINGS)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ResultError(NEEDS) from None
    return DRAWINGS[number](sources)


def save(figure: "Figure", path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, with the same bytes each time, and return the paths.

    Args:
        figure: what `draw` returns.
        path: without suffix.
    """
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(paths[0], dpi=130)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
