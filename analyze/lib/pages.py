"""A report as a list of blocks, as HTML that needs no other file, and as Markdown.

A block is its kind and its content: `h2`, `h3`, `p` and `pre` have a text, `table` a DataFrame,
`picture` the path of a PNG, `drawing` of an SVG, `words` a dict from term to meaning, and `links` a
dict from text to address.
"""

import base64
import re
import string
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

Block = tuple[str, Any]
TEMPLATE = Path(__file__).with_name("report.html")


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading in Markdown."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def contents(blocks: list[Block]) -> Block:
    return "links", {text: f"#{anchor(text)}" for kind, text in blocks if kind == "h2"}


def page(title: str, blocks: list[Block]) -> str:
    """The blocks as one HTML page."""

    def picture(path: Path) -> str:
        image = base64.b64encode(path.read_bytes()).decode()
        return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{image}"></p>'

    def table(content: pd.DataFrame) -> str:
        return f'<div class="wide">{content.to_html(border=0, index_names=False)}</div>'

    def links(content: dict[str, Any]) -> str:
        items = (
            f'<a href="{escape(str(url))}">{escape(text)}</a>' for text, url in content.items()
        )
        return f"<nav>{' '.join(items)}</nav>"

    def words(content: dict[str, str]) -> str:
        items = (f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in content.items())
        return f"<dl>{''.join(items)}</dl>"

    show: dict[str, Callable[[Any], str]] = {
        "h2": lambda text: f'<h2 id="{anchor(text)}">{escape(text)}</h2>',
        "h3": lambda text: f"<h3>{escape(text)}</h3>",
        "p": lambda text: f"<p>{escape(text)}</p>",
        "pre": lambda text: f"<pre>{escape(text)}</pre>",
        "drawing": Path.read_text,
        **{"picture": picture, "table": table, "links": links, "words": words},
    }
    body = "\n".join(show[kind](content) for kind, content in blocks)
    return string.Template(TEMPLATE.read_text()).substitute(title=escape(title), body=body)


def markdown(title: str, blocks: list[Block], root: Path) -> str:
    """The blocks as Markdown; pictures by their path from `root`."""

    def table(content: pd.DataFrame) -> str:
        flat = content.reset_index()
        rows = [flat.columns, ["---"] * flat.shape[1], *flat.to_numpy()]
        escaped = ((str(entry).replace("|", "\\|") for entry in row) for row in rows)
        return "\n".join(f"| {' | '.join(row)} |" for row in escaped)

    def picture(path: Path) -> str:
        return f"![{path.stem}]({path.relative_to(root).as_posix()})"

    show: dict[str, Callable[[Any], str]] = {
        "h2": "## {}".format,
        "h3": "### {}".format,
        "p": str,
        "pre": "```\n{}\n```".format,
        "links": lambda content: ", ".join(f"[{text}]({url})" for text, url in content.items()),
        "words": lambda content: "\n".join(f"- **{key}**: {content[key]}" for key in content),
        **{"table": table, "picture": picture, "drawing": picture},
    }
    parts = [f"# {title}", *(show[kind](content) for kind, content in blocks)]
    return "\n\n".join(parts) + "\n"
