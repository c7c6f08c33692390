"""GSM8K: grade-school word problems whose solutions end in `#### N`."""

import re
from decimal import Decimal

from crosslore_eval.errors import shown
from crosslore_eval.protocols import accuracy_protocol
from crosslore_eval.tasks.base import Fields, Hub, Row, RowError, Split, Task, text_of

ARITHMETIC_INSTRUCTION = "Solve the problem step by step. End with the answer on a line that begins with ####."


def gsm8k_row(fields: Fields, *, keep_annotations: bool = False) -> Row:
    """Return the example of one GSM8K row; `answer` keeps the original text for grading.

    Args:
        fields: `question` and `answer`.
        keep_annotations: leave the `<<48/2=24>>` calculator annotations in the solution.
    """
    question, answer = text_of(fields, "question"), text_of(fields, "answer")
    last = answer.rsplit("\n", 1)[-1]
    if not re.fullmatch(r"#### -?\d[\d,]*(\.\d+)?", last):
        raise RowError(f"the last line of `answer` must be `#### number`, got {shown(last)}")
    output = answer if keep_annotations else re.sub(r"<<[^<>\n]*>>", "", answer)
    return {"instruction": ARITHMETIC_INSTRUCTION, "input": question, "output": output, "answer": answer}


# Row counts and sums: computed from the original files (openai/grade-school-math 3101c7d5).
GSM8K = Task(
    name="gsm8k",
    version=1,
    summary="grade-school word problems",
    fields={"question": "question", "answer": "answer"},
    convert=gsm8k_row,
    reference="answer",
    protocols=(accuracy_protocol(tolerance=Decimal(0)),),
    # The longest test solution has 376 tokens of LLaMA2 without annotations.
    max_new_tokens=512,
    hub=Hub(path="openai/gsm8k", config="main"),
    splits=(
        Split(
            name="gsm8k_train",
            file="gsm8k/train.jsonl",
            hub_split="train",
            rows=7473,
            sha256="17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        ),
        Split(
            name="gsm8k_test",
            file="gsm8k/test.jsonl",
            hub_split="test",
            rows=1319,
            sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
    ),
)
