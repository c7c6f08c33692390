"""CNN/DailyMail 3.0.0: news articles to highlights."""

from crosslore_eval.protocols import PAPER_SUMMARIES, ROUGE_SCORE
from crosslore_eval.tasks.base import Fields, Hub, Row, Split, Task, text_of

HIGHLIGHTS_INSTRUCTION = "Summarise the article in a few highlights."


def cnn_dm_row(fields: Fields) -> Row:
    """Return the example of one CNN/DailyMail row."""
    article, highlights = text_of(fields, "article"), text_of(fields, "highlights")
    return {"instruction": HIGHLIGHTS_INSTRUCTION, "input": article, "output": highlights}


CNN_DM = Task(
    name="cnn_dm",
    version=1,
    summary="news articles to highlights (CNN/DailyMail 3.0.0)",
    fields={"article": "article", "highlights": "highlights"},
    convert=cnn_dm_row,
    reference="output",
    protocols=(ROUGE_SCORE, PAPER_SUMMARIES),
    # Few highlights are longer; a summary that runs on loses precision, not time.
    max_new_tokens=192,
    hub=Hub(path="abisee/cnn_dailymail", config="3.0.0"),
    splits=(
        Split(name="cnn_dm_train", file="cnn_dm/train.jsonl", hub_split="train", rows=287113),
        Split(name="cnn_dm_valid", file="cnn_dm/validation.jsonl", hub_split="validation", rows=13368),
        Split(name="cnn_dm_test", file="cnn_dm/test.jsonl", hub_split="test", rows=11490),
    ),
)
