"""A report as one HTML file with embedded pictures, which can be sent to others and opened offline."""

import base64
import html
from pathlib import Path

from uni_instruct.errors import MissingExtraError
from uni_instruct.system.files import atomic_file

STYLE = """
:root { color-scheme: light dark; --ink: #22262a; --paper: #fff; --line: #dcdfe3; --soft: #f4f5f7; --link: #1f5f8b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e8; --paper: #16181b; --line: #363a40; --soft: #212429; --link: #86bfe6 }
}
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; color: var(--ink); background: var(--paper);
       font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem } h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line) }
a { color: var(--link) }
img { max-width: 100%; background: #fff; border-radius: 4px }
.table, pre { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
pre, code { background: var(--soft); border-radius: 4px; font-size: .88rem } pre { padding: .8rem }
"""


def write_html(markdown: str, file: Path) -> Path:
    """Write Markdown as an HTML page. Paths of pictures are relative to the file's folder. Returns the file.

    HTML in the Markdown is escaped and shown as text. Raises MissingExtraError without markdown-it-py.
    """
    title = next((line[2:] for line in markdown.splitlines() if line.startswith("# ")), file.stem)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"{_body(markdown, file.parent)}</body>\n</html>\n"
    )
    with atomic_file(file) as partial:
        partial.write_text(page)
    return file


def _body(markdown: str, folder: Path) -> str:
    try:
        from markdown_it import MarkdownIt
    except ModuleNotFoundError as error:
        raise MissingExtraError("markdown-it-py", extra="train") from error
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                child.attrs["src"] = _inline(folder / str(child.attrs["src"]))
    body: str = reader.renderer.render(tokens, reader.options, {})
    # Wrapped, so that a wide table scrolls instead of the whole page.
    return body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")


def _inline(picture: Path) -> str:
    """The picture as a data URI. If the file is missing, its name, which a browser shows as a missing picture."""
    if not picture.is_file():
        return picture.name
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
