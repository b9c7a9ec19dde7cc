"""The parts of a report, each as HTML and as Markdown."""

import base64
import re
import string
from html import escape
from pathlib import Path

import pandas as pd

Block = tuple[str, str]  # HTML, Markdown
KINDS = {
    "h2": ('<h2 id="{1}">{0}</h2>', "## {0}"),
    "h3": ("<h3>{0}</h3>", "### {0}"),
    "p": ("<p>{0}</p>", "{0}"),
    "pre": ("<pre>{0}</pre>", "```\n{0}\n```"),
    "word": ("<p><b>{0}</b>: {1}</p>", "- **{0}**: {1}"),
    "link": ('<a href="{1}">{0}</a>', "- [{0}]({1})"),
}


def block(kind: str, *texts: str) -> Block:
    """One of KINDS: heading and anchor, paragraph, what was printed, word and meaning, link and
    address.
    """
    html, markdown = KINDS[kind]
    return html.format(*map(escape, texts)), markdown.format(*texts)


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading in Markdown."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def heading(text: str) -> Block:
    return block("h2", text, anchor(text))


def table(frame: pd.DataFrame) -> Block:
    flat = frame.reset_index()
    rows = [flat.columns, ["---"] * flat.shape[1], *flat.to_numpy()]
    escaped = ((str(entry).replace("|", "\\|") for entry in row) for row in rows)
    markdown = "\n".join(f"| {' | '.join(row)} |" for row in escaped)
    return f'<div class="wide">{frame.to_html(border=0, index_names=False)}</div>', markdown


def picture(path: Path, root: Path) -> Block:
    """A PNG inlined in HTML, or an SVG, which takes the page's colours."""
    markdown = f"![{path.stem}]({path.relative_to(root).as_posix()})"
    if path.suffix == ".svg":
        return path.read_text(), markdown
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{path.stem}" src="data:image/png;base64,{image}"></p>', markdown


def page(title: str, blocks: list[Block]) -> str:
    """The blocks as one HTML page that needs no other file."""
    template = string.Template(Path(__file__).with_name("report.html").read_text())
    body = "\n".join(html for html, _ in blocks)
    return template.substitute(title=escape(title), body=body)
