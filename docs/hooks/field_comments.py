"""The comment above a field becomes its description in the API reference: configurations are documented that way."""

import ast
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Reads the comment lines directly above an assignment in a class."""

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any) -> None:
        """Give an attribute without a docstring the comment above it."""
        if isinstance(node, griffe.ObjectNode) or attr.docstring or not attr.lineno or attr.parent is None:
            return
        lines, found, line = attr.lines_collection[attr.filepath], [], attr.lineno - 2
        while line >= 0 and lines[line].strip().startswith("#"):
            found.insert(0, lines[line].strip().removeprefix("#").strip())
            line -= 1
        if found:
            attr.docstring = griffe.Docstring(" ".join(found), parent=attr, lineno=line + 2)
