"""HTML that cannot be broken by what is in it: every text is escaped unless it was built here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

_VOID = frozenset({"img", "meta", "br"})
# Control characters, and those that turn the direction of a line, have no business on a page.
_CONTROL = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"
)
# An absolute path in quotes may hold spaces; one without ends at the first.
_QUOTED_PATH = re.compile(r"""(['"])(?:/|[A-Za-z]:[\\/])(?:[^'"]*[\\/])?([^'"\\/]+)[\\/]?\1""")
_BARE_PATH = re.compile(r"""(?<![\w.:/<])(?:/|[A-Za-z]:\\)(?:[^\s/\\'"]+[/\\])+""")


class Html(str):
    """Text that is markup already. Only `element`, `joined` and this module's callers that write constants make it."""

    __slots__ = ()


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return `<name ...>children</name>`; texts and attribute values are escaped, `Html` children are not.

    Attributes are given as Python names: `class_`, `aria_label`; None leaves one out.
    """
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{''.join(pairs)}>"
    return Html(start if name in _VOID else f"{start}{joined(children)}</{name}>")


def joined(children: Iterable[Any], separator: str = "") -> Html:
    """Return children one after the other, texts escaped."""
    return Html(separator.join(child if isinstance(child, Html) else escaped(child) for child in children))


def escaped(value: Any) -> str:
    """Return a value's text for use in markup or an attribute; control characters become U+FFFD."""
    return html.escape(str(value).translate(_CONTROL))


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], *, class_: str = "") -> Html:
    """Return a table with one row of headings; cells that are `<td>` elements already are kept as they are."""
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    body = (element("tr", *(_cell(value) for value in row)) for row in rows)
    inner = element("table", element("thead", head), element("tbody", *body))
    return element("div", inner, class_=f"scroll {class_}".strip())


def document(title: str, *sections: Html) -> str:
    """Return a whole HTML page that loads nothing and runs nothing: the browser is told to refuse both."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        ),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    return "<!doctype html>\n" + element("html", head, element("body", element("main", *sections)), lang="en")


def encoded(page: str) -> bytes:
    """Return a page as UTF-8; the bytes of a file name that are no text are shown as escapes."""
    return page.encode("utf-8", "backslashreplace")


def without_folders(text: str) -> str:
    """Return text with every absolute path reduced to its last part: whose machine it was is nobody's business.

    "cannot read '/home/me/scans/a.nii'" -> "cannot read 'a.nii'"; relative paths and URLs of object stores stay as they are.
    """
    return _BARE_PATH.sub("", _QUOTED_PATH.sub(r"\1\2\1", text.replace("file://", "")))


def _cell(value: Any) -> Html:
    return value if isinstance(value, Html) and value.startswith("<td") else element("td", value)


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1c2126; --muted: #5b6570; --line: #dfe3e8;
  --bar: #3d7dca; --mark: #c2410c; --good: #2e8b57; --same: #5b7fa6; --warn: #b7791f; --bad: #c53030; --soft: #fdf3e1; }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #1a1f25; --text: #e6e9ec; --muted: #9aa5b1;
  --line: #2d353e; --bar: #6aa5e8; --mark: #f59e6b; --good: #5fbf8a; --same: #8fb0d4;
  --warn: #e3b04b; --bad: #f07a7a; --soft: #2e2717; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 4px; }
h3 { font-size: 15px; margin: 22px 0 6px; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; max-width: 86ch; }
.muted, figcaption, .source { color: var(--muted); }
.source { font-size: 13px; overflow-wrap: anywhere; margin: 0; }
nav { margin: 14px 0 0; font-size: 14px; } nav a { margin-right: 16px; }
a { color: var(--bar); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 8px; }
.tile { background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--tone, var(--line));
  border-radius: 8px; padding: 10px 18px; min-width: 112px; }
.tile b { display: block; font-size: 25px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.prepared { --tone: var(--good); } .unchanged { --tone: var(--same); }
.refused { --tone: var(--warn); } .failed { --tone: var(--bad); }
.state { color: var(--tone, inherit); font-weight: 600; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 16px; align-items: start; }
.columns > figure { max-width: 560px; }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; margin: 0; }
.panel h3:first-child { margin-top: 0; }
figcaption { font-size: 13px; margin-bottom: 4px; } figcaption b { color: var(--text); font-weight: 600; }
figcaption span { display: block; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--muted); font-size: 11px; }
svg .bar { fill: var(--bar); } svg .mark { stroke: var(--mark); stroke-dasharray: 4 3; } svg .mark-label { fill: var(--mark); }
svg .base { stroke: var(--line); } svg .area { fill: var(--bar); opacity: .3; }
svg .curve { fill: none; stroke: var(--bar); stroke-width: 1.5; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; } th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td { overflow-wrap: anywhere; } td.tight { white-space: nowrap; } td.name { min-width: 190px; } td.wide { min-width: 240px; }
td.number, th.number { text-align: right; }
.card { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 20px; margin: 14px 0; break-inside: avoid; }
.card h3 { margin: 0; } .card img { width: 100%; height: auto; border-radius: 6px; display: block; background: #0b0d10; }
.card .none { border: 1px dashed var(--line); border-radius: 6px; padding: 40px 20px; color: var(--muted); text-align: center; }
.card dl { display: grid; grid-template-columns: max-content 1fr; gap: 1px 14px; margin: 8px 0; font-size: 13px;
  font-variant-numeric: tabular-nums; }
dt { color: var(--muted); } dd { margin: 0; } dd b { color: var(--mark); }
.remarks { margin: 8px 0; padding: 7px 12px 7px 28px; background: var(--soft); border-radius: 6px; font-size: 13px; }
.spark { height: 40px; margin-top: 10px; }
details { margin: 14px 0; } summary { cursor: pointer; font-weight: 600; margin-bottom: 6px; }
.reasons table { table-layout: fixed; min-width: 640px; } .reasons th:nth-child(1) { width: 22%; }
.reasons th:nth-child(2) { width: 28%; }
@media (max-width: 820px) { .card { grid-template-columns: 1fr; } }
@media print { body { background: #fff; font-size: 11px; } main { max-width: none; padding: 0; } nav { display: none; }
  .scroll { overflow: visible; } details::details-content { content-visibility: visible; block-size: auto; }
  .panel, figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
