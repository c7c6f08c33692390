"""The two small sets that come with this project, written for it: what `make demo` trains on and scores."""

from decimal import Decimal

from crosslore_eval.protocols import E2E_OFFICIAL, PAPER, accuracy_protocol
from crosslore_eval.tasks.base import Fields, Row, Split, Task, text_of


def alpaca_row(fields: Fields) -> Row:
    """Return a row that is in LLaMA-Factory's alpaca format already."""
    return {name: text_of(fields, name) for name in ("instruction", "input", "output")}


FIELDS = {name: name for name in ("instruction", "input", "output")}

RESTAURANTS = Task(
    name="restaurants",
    version=1,
    summary="restaurant attributes to text, 120 rows bundled with this project",
    fields=FIELDS,
    convert=alpaca_row,
    reference="output",
    groups_rows=True,
    is_bundled=True,
    protocols=(E2E_OFFICIAL, PAPER),
    max_new_tokens=64,
    stop=("\n",),
    splits=(
        Split(name="restaurants_train", file="restaurants_train.json", hub_split="train", rows=800),
        Split(name="restaurants_test", file="restaurants_test.json", hub_split="test", rows=120),
    ),
)
ARITHMETIC = Task(
    name="arithmetic",
    version=1,
    summary="word problems, 120 rows bundled with this project",
    fields=FIELDS,
    convert=alpaca_row,
    reference="output",
    is_bundled=True,
    protocols=(accuracy_protocol(tolerance=Decimal(0)),),
    max_new_tokens=80,
    splits=(
        Split(name="arithmetic_train", file="arithmetic_train.json", hub_split="train", rows=800),
        Split(name="arithmetic_test", file="arithmetic_test.json", hub_split="test", rows=120),
    ),
)
