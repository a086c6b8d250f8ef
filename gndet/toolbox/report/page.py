"""The page: one HTML file without server or network, for light and dark mode, phones and print."""

from collections.abc import Sequence
from importlib.resources import files

from gndet.toolbox.report.blocks import Section, escape

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Assemble a page, whose policy forbids every outside request."""
    folder = files("gndet.toolbox.report")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<a href="#{escape(id)}">{escape(title)}</a>' for id, title, _ in sections)
    body = "\n".join(section.html for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
<nav aria-label="contents">{links}</nav>
<main>
{body}
</main>
<dialog id="large"><form method="dialog"><button aria-label="close">×</button></form><img alt=""><p></p></dialog>
<script>
{script}</script>
</body>
</html>
"""
