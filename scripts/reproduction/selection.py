"""Some of the cells, by their fields: `method=crosslore,rank=16`."""

from collections.abc import Sequence

from crosslore_eval.errors import unknown_name
from reproduction.cells import TUNING, Experiment

# A learning rate is chosen once for all of these.
OF_NO_TUNING = ("rank", "seed", "column")
FIELDS = ("method", "rank", "dataset", "model", "seed", "column")


def select(cells: Sequence[Experiment], text: str) -> list[Experiment]:
    """Return the cells that a selection asks for, all for an empty one.

    Args:
        cells: to choose from.
        text: `field=value` with commas; a value without a field belongs to the field before it, or to the one field
            that has it. Several values of a field are alternatives.

    Raises:
        ValueError: if a field is unknown or no cell has a value.
    """
    wanted: dict[str, set[str]] = {}
    last = ""
    for word in filter(None, (part.strip() for part in text.split(","))):
        field, equals, value = word.partition("=")
        if not equals:
            field, value = last or _field_of(word, cells), word
        if field not in FIELDS:
            raise unknown_name("field of --only", field, FIELDS)
        known = sorted({str(getattr(cell, field)) for cell in cells})
        if value not in known:
            raise unknown_name(f"{field} in --only", value, known)
        wanted.setdefault(field, set()).add(value)
        last = field if equals else last
    found = [cell for cell in cells if all(_matches(cell, name, values) for name, values in wanted.items())]
    tables = [cell for cell in found if cell.table != TUNING]
    if cells and not (tables or (found and all(cell.table == TUNING for cell in cells))):
        raise ValueError(f"--only must leave a cell, {text!r} leaves none: no cell has all of it. Leave a part out.")
    return found


def needed(cells: Sequence[Experiment], targets: Sequence[str]) -> list[Experiment]:
    """Return cells without the runs for tuning that none of the others takes its learning rate from.

    Args:
        cells: of some targets.
        targets: what was asked for; runs for tuning alone are all kept.
    """
    if set(targets) == {TUNING}:
        return list(cells)
    places = {(cell.model, cell.base_method, cell.dataset) for cell in cells if cell.table != TUNING}
    return [cell for cell in cells if cell.table != TUNING or (cell.model, cell.method, cell.dataset) in places]


def _matches(cell: Experiment, name: str, values: set[str]) -> bool:
    if cell.table == TUNING and name in OF_NO_TUNING:
        return True
    found = cell.base_method if cell.table == TUNING and name == "method" else str(getattr(cell, name))
    return found in values


def _field_of(value: str, cells: Sequence[Experiment]) -> str:
    found = [name for name in FIELDS if any(str(getattr(cell, name)) == value for cell in cells)]
    if len(found) != 1:
        raise ValueError(
            f"--only: {value!r} is {'of no field' if not found else ' and '.join(found)} of these cells. "
            f"Write FIELD={value}, FIELD one of {', '.join(FIELDS)}."
        )
    return found[0]
