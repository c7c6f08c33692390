"""XSum: BBC articles to one sentence."""

from crosslore_eval.protocols import PAPER_SUMMARIES, ROUGE_SCORE
from crosslore_eval.tasks.base import Fields, Hub, Row, Split, Task, text_of

SENTENCE_INSTRUCTION = "Summarise the article in one sentence."


def xsum_row(fields: Fields) -> Row:
    """Return the example of one XSum row."""
    document, summary = text_of(fields, "document"), text_of(fields, "summary")
    return {"instruction": SENTENCE_INSTRUCTION, "input": document, "output": summary}


XSUM = Task(
    name="xsum",
    version=1,
    summary="BBC articles to one sentence",
    fields={"document": "document", "summary": "summary"},
    convert=xsum_row,
    reference="output",
    protocols=(ROUGE_SCORE, PAPER_SUMMARIES),
    max_new_tokens=96,
    # Summaries have one line.
    stop=("\n",),
    hub=Hub(path="EdinburghNLP/xsum", revision="refs/convert/parquet"),
    splits=(
        Split(name="xsum_train", file="xsum/train.jsonl", hub_split="train", rows=204045),
        Split(name="xsum_valid", file="xsum/validation.jsonl", hub_split="validation", rows=11332),
        Split(name="xsum_test", file="xsum/test.jsonl", hub_split="test", rows=11334),
    ),
)
