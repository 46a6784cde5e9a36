"""Pieces of HTML: tables, figures, lists of facts, code and sentences, with all text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]], style: str = "wide") -> str:
    """Table of text whose first column names the rows; on a narrow page the table scrolls by itself.

    Args:
        caption: Caption.
        headings: Heading of each column.
        rows: Cells of each row.
        style: Class of the style sheet: ``wide`` for numbers, ``texts`` for texts side by side, with their line breaks.
    """
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<div class="{style}"><table>\n<caption><span>{escape(caption)}</span></caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def folded(summary: str, content: str) -> str:
    """Content that is shown when its summary is clicked."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>"


def figure(svg: str, caption: str) -> str:
    """Picture with its caption; on a narrow page the picture scrolls by itself."""
    return f'<figure>\n<div class="card">{svg}</div>\n<figcaption>{escape(caption)}</figcaption>\n</figure>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """List of terms, each with a fact."""
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(fact)}</dd>' for term, fact in pairs)}</dl>"


def code(text: str) -> str:
    """Code or YAML as it is, with its line breaks."""
    return f"<pre><code>{escape(text.rstrip())}</code></pre>"


def said(sentence: str, style: str = "said") -> str:
    """Paragraph with a sentence; the style is a class of the style sheet."""
    return f'<p class="{style}">{escape(sentence)}</p>'
