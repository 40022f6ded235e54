"""Pieces of an HTML page that needs nothing else: no file, network or script.

Every text passes through `text`, and figures are data URIs.
"""

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 68rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.8rem; margin: 0; } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ccc; }
h3 { margin: 1.5rem 0 .3rem; } p { max-width: 48rem; margin: .5rem 0; }
nav ul { columns: 15rem 3; padding-left: 1.2rem; }
a { color: #14527f; } .note { border-left: 4px solid #d1a545; padding-left: .8rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } .pair { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
table { border-collapse: collapse; margin: .7rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid #777; white-space: nowrap; } tbody th { font-weight: 400; }
th:first-child, .words td, .words th { text-align: left; overflow-wrap: anywhere; min-width: 9rem; }
figure { margin: 1rem 0; break-inside: avoid; } figure img { max-width: 100%; height: auto; }
figcaption, .small { font-size: .85rem; color: #444; } pre { font-size: .8rem; white-space: pre-wrap; }
.side { display: flex; gap: .8rem; break-inside: avoid; }
.side figure { flex: 1 1 0; min-width: 0; margin: .4rem 0; }
.example figure { max-width: 21rem; overflow-wrap: anywhere; }
.example img { width: 100%; box-sizing: border-box; border: 1px solid #ccc; }
.names span { display: inline-block; margin-right: .9rem; }
@media print { body { font-size: 10pt; max-width: none; padding: 0; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } .pair, .scroll { break-inside: avoid; }
  table { font-size: 8pt; } tr { break-inside: avoid; } th, td { padding: .1rem .3rem; }
}
"""
BEGINNING = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>'  # of every report


def text(value: object) -> str:
    """Anything, harmless inside an element and inside a quoted attribute."""
    return html.escape(str(value))


def percent(value: float, form: str = ".1f") -> str:
    """A share; - for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:{form}}"


def table(head: Sequence, rows: Sequence[Sequence], caption: str = "", words: bool = False) -> str:
    """The first cell of a row is its heading. words: cells are texts, not numbers."""
    lines = "".join(
        f'<tr><th scope="row">{text(first)}</th>{"".join(f"<td>{text(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    names = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    top = f"<thead><tr>{names}</tr></thead>" if head else ""
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    kind = ' class="words"' if words else ""
    return f'<div class="scroll"><table{kind}>{title}{top}<tbody>{lines}</tbody></table></div>'


def figure(content: bytes, alt: str, caption: str = "", kind: str = "png") -> str:
    """An image in the page itself; caption: text, not HTML."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<figure><img src="{source}" alt="{text(alt)}"><figcaption>{text(caption)}</figcaption></figure>'


def drawn(plot: Callable[..., object], *arguments: Any, **settings: Any) -> bytes:
    """The bytes that a function of `plots` writes."""
    file = io.BytesIO()
    plot(file, *arguments, **settings)
    return file.getvalue()


def document(title: str, lead: str, notes: Sequence[str], sections: dict[str, str]) -> str:
    """The whole page. title, notes and the sections' names: texts; lead and sections: HTML, or empty for none."""
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f'<li><a href="#s{k}">{text(name)}</a></li>' for k, name in enumerate(sections))
    remarks = "".join(f'<p class="note">{text(note)}</p>' for note in notes)
    body = "".join(
        f'<section><h2 id="s{k}">{text(name)}</h2>{content}</section>\n'
        for k, (name, content) in enumerate(sections.items())
    )
    return (
        f"{BEGINNING}{text(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><header><h1>{text(title)}</h1>{lead}</header>\n"
        f"{remarks}<nav><ul>{links}</ul></nav>\n<main>{body}</main></body></html>\n"
    )
