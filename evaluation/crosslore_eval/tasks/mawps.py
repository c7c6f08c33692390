"""MAWPS: one-step to three-step word problems with a number as the answer; LLM-Adapters' split."""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Decimal

from crosslore_eval.protocols import accuracy_protocol
from crosslore_eval.tasks.base import Fields, Row, Split, Task, number_of, text_of
from crosslore_eval.tasks.gsm8k import ARITHMETIC_INSTRUCTION

# Predictions count as right within this distance (LLM-Adapters' evaluation).
MAWPS_TOLERANCE = 0.001

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def number_text(value: float) -> str:
    """Return a number without trailing zeros, at most four decimals (a tenth of the grading tolerance and finer)."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


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

    "X=((22.0-14.0)/4.0)" becomes "(22 - 14) / 4". Of the 2373 rows, 67 give None. For training examples only: a
    model's output never comes here.
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


# Row counts and sums: computed from LLM-Adapters 81665720, as JSON lines.
MAWPS = Task(
    name="mawps",
    version=1,
    summary="one-step to three-step word problems",
    fields={"original_text": "original_text", "equation": "equation", "ans": "ans"},
    convert=mawps_row,
    reference="ans",
    protocols=(accuracy_protocol(tolerance=Decimal(str(MAWPS_TOLERANCE))),),
    # Training solutions have at most 50 tokens; room for a model that reasons in words.
    max_new_tokens=256,
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
)
