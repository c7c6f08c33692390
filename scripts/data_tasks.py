"""GSM8K, MAWPS and E2E: which files and rows they have, and how one row becomes a training example."""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

RESTAURANTS_INSTRUCTION = "Describe the restaurant from its attributes."
ARITHMETIC_INSTRUCTION = "Solve the problem step by step. End with the answer on a line that begins with ####."
# Predictions for MAWPS count as right within this distance (LLM-Adapters' evaluation).
MAWPS_TOLERANCE = 0.001

Fields = dict[str, object]
Row = dict[str, str | float]


class RowError(ValueError):
    """A row cannot be used; the message says what its fields must be."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One file of a data set, and the name that LLaMA-Factory will know it by."""

    name: str
    # path below --source
    file: str
    hub_split: str
    rows: int
    # of the original file
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where the same rows are on the Hugging Face hub."""

    path: str
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set."""

    # field -> its name on the hub; files carry the keys
    fields: dict[str, str]
    splits: tuple[Split, ...]
    convert: Callable[[Fields], Row]
    # None: no data set on the hub holds exactly these rows
    hub: Hub | None = None


def shown(value: object) -> str:
    """Return a value for a message, cut to one short line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def text_of(fields: Fields, name: str) -> str:
    """Return a field that must be text."""
    if name not in fields:
        raise RowError(f"field `{name}` is missing; fields found: {', '.join(map(str, fields)) or 'none'}")
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"field `{name}` must be text that is not empty, got {shown(value)}")
    return value.strip()


def number_of(fields: Fields, name: str) -> float:
    """Return a field that must be a finite number, or text that holds one."""
    value = fields.get(name)
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not isfinite(number):
        raise RowError(f"field `{name}` must be a number, got {shown(value)}")
    return number


def number_text(value: float) -> str:
    """Return a number without trailing zeros, at most four decimals (a tenth of the grading tolerance and finer)."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


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


OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_of(node: ast.expr) -> float:
    """Return the value of an expression of numbers, + - * / and signs; ValueError if it has anything else."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value_of(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value_of(left), value_of(right))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")


def expression_of(equation: str, *, answer: float) -> str | None:
    """Return the right side of `x=expression`, tidied, or None if it is not one or does not give `answer`.

    "X=((22.0-14.0)/4.0)" becomes "(22 - 14) / 4". Of the 2373 rows, 67 give None.
    """
    found = re.fullmatch(r"\s*[xX]\s*=\s*([-+*/().\d\s]+)", equation)
    if found is None:
        return None
    whole = re.sub(r"(?<![\d.])(\d+)\.0+(?!\d)", r"\1", found[1].strip())
    try:
        tree = ast.parse(whole, mode="eval")
        right = abs(value_of(tree.body) - answer) <= MAWPS_TOLERANCE
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        return None
    return ast.unparse(tree) if right else None


def mawps_row(fields: Fields) -> Row:
    """Return the example of one MAWPS row; `ans` keeps the exact number for grading."""
    problem, equation, answer = text_of(fields, "original_text"), text_of(fields, "equation"), number_of(fields, "ans")
    expression = expression_of(equation, answer=answer)
    solution = f"{expression} = {number_text(answer)}\n" if expression is not None else ""
    output = f"{solution}#### {number_text(answer)}"
    return {"instruction": ARITHMETIC_INSTRUCTION, "input": problem, "output": output, "ans": answer}


def e2e_row(fields: Fields) -> Row:
    """Return the example of one E2E row; line breaks and repeated spaces in the reference become one space."""
    meaning, reference = text_of(fields, "mr"), text_of(fields, "ref")
    if not re.fullmatch(r"(?s)[^\[\]]+\[.*\]", meaning):
        raise RowError(f"field `mr` must be `attribute[value], ...`, got {shown(meaning)}")
    return {"instruction": RESTAURANTS_INSTRUCTION, "input": meaning, "output": " ".join(reference.split())}


# Row counts and sums: computed from the original files (GSM8K: openai/grade-school-math 3101c7d5; MAWPS:
# LLM-Adapters 81665720, as JSON lines; E2E: tuetschek/e2e-dataset ab0d967d, the original release of 2018).
TASKS: dict[str, Task] = {
    "gsm8k": Task(
        fields={"question": "question", "answer": "answer"},
        convert=gsm8k_row,
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
    ),
    "mawps": Task(
        fields={"original_text": "original_text", "equation": "equation", "ans": "ans"},
        convert=mawps_row,
        splits=(
            Split(
                name="mawps_train",
                file="mawps/train.jsonl",
                hub_split="train",
                rows=1898,
                sha256="dceda84502f754f2ba1db96e67ebad75e08901e09723dcfa21010f9f26c50e5a",
            ),
            Split(
                name="mawps_valid",
                file="mawps/valid.jsonl",
                hub_split="validation",
                rows=237,
                sha256="8f953ed026f6534510e5d05188a8e1d4589073dfb799acc951c26bc26413d509",
            ),
            Split(
                name="mawps_test",
                file="mawps/test.jsonl",
                hub_split="test",
                rows=238,
                sha256="ef2082d7f69e660fc718d27c05cd1d97850130fcf5a0381b9e057ee7b1b893a0",
            ),
        ),
    ),
    "e2e": Task(
        fields={"mr": "meaning_representation", "ref": "human_reference"},
        convert=e2e_row,
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
    ),
}
