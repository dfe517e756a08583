"""Docstrings announce formulas with the two colons of reStructuredText; Markdown wants one."""

import griffe


class Literal(griffe.Extension):
    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("::\n\n", ":\n\n")
