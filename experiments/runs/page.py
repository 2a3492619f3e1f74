"""Reports: one HTML file each, which needs no other, no script and no network."""

import base64
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.runs.files import write_json, write_text

GENERATOR = "sgd_jax"
"""What a report names as its maker, so that it is told from a file of the user's."""

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #595959; --line: #ddd;
  --link: #0b57b0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #17191c; --faint: #a8adb3;
  --line: #3a3f45; --link: #8ab4f8; } }
* { box-sizing: border-box; }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 64rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin-top: 2rem; }
h1, h2, h3, p, li { overflow-wrap: anywhere; } a { color: var(--link); }
article { border-top: 2px solid var(--line); margin-top: 3rem; }
figure { margin: 0; } figcaption { color: var(--faint); font-size: .9rem; margin-top: .5rem; }
.wide { overflow-x: auto; } .wide:focus-visible { outline: 2px solid var(--link); }
img { display: block; width: 100%; min-width: 40rem; height: auto; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
summary { cursor: pointer; margin: .5rem 0; }
.pairs { width: 100%; table-layout: fixed; } .pairs th, .pairs td { text-align: left;
  vertical-align: top; font-weight: normal; white-space: normal; overflow-wrap: anywhere; }
.pairs th { color: var(--faint); width: 45%; }
@media (min-width: 40rem) { .pairs th { width: 18rem; } }
/* Figures are black on white: in the dark they are turned over, and keep their hues. */
@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg); } }
@media print { img { filter: none; } .wide { overflow: visible; } img { min-width: 0; } }
"""
_IMAGE = re.compile(r'(?<=<img src=")[^"]*')  # of what html_figure writes; other text is escaped


class Page(NamedTuple):
    """What a report says."""

    title: str
    """Plain text."""
    sections: dict[str, str]
    """HTML by heading; the heading "" shows none. Pictures are named by the path of their file."""


def write_page(path: Path, title: str, sections: Mapping[str, str]) -> None:
    """Writes a report as one HTML file without scripts or links, replaced atomically.

    The same goes into a `.json` file beside it, where pictures are named and not held, so that
    `read_page` finds it and a report can be made anew, or joined with others.

    Args:
      path: Of the HTML file.
      title: Plain text.
      sections: HTML by heading, of `html_figure`, `html_pairs`, `html_table` and paragraphs; the
        heading "" shows none.

    Raises:
      FileNotFoundError: there is no file of a picture.
    """

    def relative(match: re.Match[str]) -> str:
        picture = os.path.relpath(html.unescape(match[0]), path.parent)
        return html.escape(Path(picture).as_posix())

    kept = {heading: _IMAGE.sub(relative, body) for heading, body in sections.items()}
    body = [f"<h1>{html.escape(title)}</h1>", *_sections(sections, level=2)]
    _write_document(path, title, body)
    write_json(path.with_suffix(".json"), {"title": title, "sections": kept})


def read_page(path: Path) -> Page:
    """Returns what `write_page` wrote at ``path``, from the `.json` file beside it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not one that `write_page` wrote.
    """
    source = path.with_suffix(".json")
    try:
        stored = json.loads(source.read_text(encoding="utf-8"))
        title, sections = stored["title"], dict(stored["sections"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source} is not what a report is made of ({error!r}); expected a title and sections, "
            "as the run wrote it. Run it again"
        ) from error

    def absolute(match: re.Match[str]) -> str:
        return html.escape(str(path.parent.absolute() / html.unescape(match[0])))

    return Page(title, {name: _IMAGE.sub(absolute, body) for name, body in sections.items()})


def write_joined_page(path: Path, title: str, pages: Sequence[Page]) -> None:
    """Writes several reports as one HTML file, each under its own title, with a list of contents.

    Raises:
      FileNotFoundError: there is no file of a picture.
    """
    contents = (
        f'<li><a href="#part-{number}">{html.escape(page.title)}</a></li>'
        for number, page in enumerate(pages, 1)
    )
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<nav aria-label="Contents"><ol>{"".join(contents)}</ol></nav>',
    ]
    for number, page in enumerate(pages, 1):
        heading = f'<h2 id="part-{number}">{html.escape(page.title)}</h2>'
        body += [f'<article aria-labelledby="part-{number}">', heading]
        body += [*_sections(page.sections, level=3), "</article>"]
    _write_document(path, title, body)


def _sections(sections: Mapping[str, str], level: int) -> list[str]:
    """Returns sections as HTML, headings at a level, pictures held by the HTML."""
    parts = []
    for heading, body in sections.items():
        title = f"<h{level}>{html.escape(heading)}</h{level}>" if heading else ""
        parts.append(f"<section>{title}\n{_IMAGE.sub(_inline, body)}</section>")
    return parts


def _inline(match: re.Match[str]) -> str:
    path = Path(html.unescape(match[0]))
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _write_document(path: Path, title: str, body: Sequence[str]) -> None:
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="generator" content="{GENERATOR}">',
        '<link rel="icon" href="data:,">',  # else a browser asks its server for one
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>",
    ]
    write_text(path, "\n".join([*head, *body, "</main></body></html>\n"]))


def html_figure(figure: Path, description: str, caption: str = "") -> str:
    """Returns a PNG or GIF file as HTML for `write_page`, which then holds the picture itself.

    Args:
      figure: The file.
      description: What the picture shows, for a reader who cannot see it: plain text.
      caption: Plain text to stand below it.
    """
    alt, source = html.escape(description), html.escape(str(figure.absolute()))
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    picture = _scrolling(f'<img src="{source}" alt="{alt}">', "Figure")
    return f"<figure>{picture}{below}</figure>"


def html_pairs(values: Mapping[str, Any]) -> str:
    """Returns names and values as an HTML table."""
    rows = (
        f'<tr><th scope="row">{html.escape(str(name))}</th>'
        f"<td>{html.escape(_show(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<table class="pairs"><tbody>{"".join(rows)}</tbody></table>'


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_show(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_show, value)) or "none"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_MAX_ROWS = 32
"""Of a table that a report shows at once; a longer one is folded."""


def html_table(labels: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table of plain text, folded if it is long."""
    head = "".join(f'<th scope="col">{html.escape(label)}</th>' for label in labels)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    shown = _scrolling(table, "Table")
    if len(rows) <= _MAX_ROWS:
        return shown
    return f"<details><summary>{len(rows)} rows</summary>{shown}</details>"


def _scrolling(content: str, label: str) -> str:
    """Returns what may be wider than a phone, in a box that scrolls, also by the keyboard."""
    return f'<div class="wide" role="group" aria-label="{label}" tabindex="0">{content}</div>'
