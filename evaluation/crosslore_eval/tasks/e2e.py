"""E2E NLG: a restaurant's attributes to a sentence; the original release of 2018, several references an input."""

import re

from crosslore_eval.errors import shown
from crosslore_eval.protocols import E2E_OFFICIAL, PAPER
from crosslore_eval.tasks.base import Fields, Hub, Row, RowError, Split, Task, text_of

RESTAURANTS_INSTRUCTION = "Describe the restaurant from its attributes."


def e2e_row(fields: Fields) -> Row:
    """Return the example of one E2E row; line breaks and repeated spaces in the reference become one space."""
    meaning, reference = text_of(fields, "mr"), text_of(fields, "ref")
    if not re.fullmatch(r"(?s)[^\[\]]+\[.*\]", meaning):
        raise RowError(f"field `mr` must be `attribute[value], ...`, got {shown(meaning)}")
    return {"instruction": RESTAURANTS_INSTRUCTION, "input": meaning, "output": " ".join(reference.split())}


# Row counts and sums: computed from tuetschek/e2e-dataset ab0d967d.
E2E = Task(
    name="e2e",
    version=1,
    summary="restaurant attributes to text (original release)",
    fields={"mr": "meaning_representation", "ref": "human_reference"},
    convert=e2e_row,
    reference="output",
    groups_rows=True,
    protocols=(E2E_OFFICIAL, PAPER),
    # The longest test reference has 102 tokens of LLaMA2.
    max_new_tokens=128,
    # References have one line.
    stop=("\n",),
    # The data set itself is a script, which `datasets` refuses; this revision is its parquet conversion.
    hub=Hub(path="tuetschek/e2e_nlg", revision="refs/convert/parquet"),
    splits=(
        Split(
            name="e2e_train",
            file="e2e/trainset.csv",
            hub_split="train",
            rows=42061,
            sha256="f27d48df45815288ab15619d47a79028c300fbb7f42e373668aba0b98c1d57c6",
        ),
        Split(
            name="e2e_dev",
            file="e2e/devset.csv",
            hub_split="validation",
            rows=4672,
            sha256="fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
        ),
        Split(
            name="e2e_test",
            file="e2e/testset_w_refs.csv",
            hub_split="test",
            rows=4693,
            sha256="edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
        ),
    ),
)
