"""Lets the site show the docstrings as the house writes them; an extension of Griffe.

A docstring here is read by people and by doctest. Markdown would take `>>>` for three quotations,
so examples are put into fences, and `::` at the end of a line, which announces a block, into `:`.
"""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # to the next empty line


class FencedDoctests(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by Griffe with each module, class, function and attribute."""
        del kwargs
        if obj.docstring:
            obj.docstring.value = fence(obj.docstring.value)


def fence(docstring: str) -> str:
    """Returns a docstring whose examples stand in fences."""
    fenced = _EXAMPLE.sub(lambda match: f"```pycon\n{match[0]}\n```", docstring)
    return re.sub(r"::$", ":", fenced, flags=re.MULTILINE)
