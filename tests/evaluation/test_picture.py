from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "crosslore[eval]"')

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

from crosslore_eval.bootstrap import Interval  # noqa: E402
from crosslore_eval.errors import EvalError  # noqa: E402
from crosslore_eval.picture import draw, figure_of  # noqa: E402
from crosslore_eval.scoring import Report, Score  # noqa: E402


def report(*values: float | None, width: float = 0.1) -> Report:
    scores = [
        Score(name=f"SCORE_{i}", value=value)
        if value is None
        else Score(name=f"SCORE_{i}", value=value, interval=Interval(low=value * (1 - width), high=value * (1 + width)))
        for i, value in enumerate(values)
    ]
    return Report(task="e2e", protocol="paper", n=1, scores=scores, samples=1000)


def boxes_of(figure: Any) -> list[Any]:
    """The boxes of everything that is written in the figure: numbers, ticks, titles, legend."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    panels = figure.axes
    texts = [*figure.legends[0].get_texts(), figure._suptitle]
    for panel in panels:
        low, high = panel.get_ylim()
        ticks = [tick for tick in panel.get_yticklabels() if low <= tick.get_position()[1] <= high]
        texts += [panel.title, *panel.texts, *panel.get_xticklabels(), *ticks]
    return [text.get_window_extent(renderer) for text in texts if text.get_text()]


LONG = "saves/eval/a-run-with-a-long-name-and-its-settings-lr-1e-6-rank-128/checkpoint-1500--e2e.jsonl"


@pytest.mark.parametrize("count", [1, 2, 5, 7, 10])
def test_nothing_that_is_written_overlaps_or_leaves_the_picture(count: int) -> None:
    systems = {f"A {LONG}": report(*[12.3456] * count), f"B {LONG}": report(*[65.4321] * count)}
    figure = figure_of(systems)
    boxes = boxes_of(figure)
    assert len(figure.axes) == count
    overlapping = [(i, j) for i, one in enumerate(boxes) for j, other in enumerate(boxes[:i]) if one.overlaps(other)]
    assert overlapping == []
    whole = figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1 for box in boxes)


def test_scores_of_nothing_get_an_axis_to_1() -> None:
    (zero, tiny, small) = figure_of({"A a": report(0.0, 8e-12, 0.02), "B b": report(0.0, 8e-12, 0.02)}).axes
    assert zero.get_ylim() == (0.0, 1.0) and tiny.get_ylim() == (0.0, 1.0)
    assert small.get_ylim() == (0.0, pytest.approx(1.15 * 0.022))
    assert [text.get_text() for text in tiny.texts] == ["0.0000", "0.0000"]


def test_an_interval_that_rounding_turned_around_is_drawn() -> None:
    (panel,) = figure_of({"A a": report(0.5, width=-1e-16)}).axes
    assert [text.get_text() for text in panel.texts] == ["0.5000"]


def test_scores_that_could_not_be_computed_are_left_out(tmp_path: Path) -> None:
    assert [panel.get_title() for panel in figure_of({"a": report(None, 0.5)}).axes] == ["SCORE_1"]
    with pytest.raises(EvalError, match="--plot needs a score, got none that could be computed for e2e"):
        draw({"a": report(None)}, tmp_path / "none.png")


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_each_ending_is_written(ending: str, start: bytes, tmp_path: Path) -> None:
    draw({"A a": report(0.5), "B b": report(0.5)}, tmp_path / f"p.{ending}")
    assert (tmp_path / f"p.{ending}").read_bytes().startswith(start)
