"""Hook of MkDocs: a fenced block of language `math` is LaTeX, and becomes MathML.

Browsers show MathML themselves, so a page needs neither a script nor a font from elsewhere, and a
screen reader reads it as mathematics. GitHub renders the same blocks.
"""

from typing import Any

from latex2mathml import converter


def on_config(config: Any) -> Any:
    """Adds the kind of block to those of pymdownx.superfences; called by MkDocs."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": to_mathml}]
    return config


def to_mathml(source: str, *context: Any, **options: Any) -> str:
    """Returns LaTeX as HTML; what else superfences hands over is not needed."""
    del context, options
    return f'<div class="math" tabindex="0">{converter.convert(source, display="block")}</div>'
