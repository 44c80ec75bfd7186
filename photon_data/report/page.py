"""A page from a template: one file that opens offline, where no text from a scan is taken for markup."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Control characters, and those that turn the direction of a line, have no business on a page.
_CONTROL = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"
)
# An absolute path in quotes may hold spaces; one without ends at the first.
_QUOTED_PATH = re.compile(r"""(['"])(?:/|[A-Za-z]:[\\/])(?:[^'"]*[\\/])?([^'"\\/]+)[\\/]?\1""")
_BARE_PATH = re.compile(r"""(?<![\w.:/<])(?:/|[A-Za-z]:\\)(?:[^\s/\\'"]+[/\\])+""")


def render(template: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[..., str]]) -> bytes:
    """Return the page that a template makes of `values`, as UTF-8.

    `filters` are the template's own, beside `thousands` and `without_folders`. The template may extend and import those
    beside this file. Every value is escaped. Control characters become U+FFFD, and the bytes of a file name that are no
    text are shown as escapes. jinja2.UndefinedError for a name that the template uses and `values` lacks.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value.translate(_CONTROL) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"thousands": "{:,}".format, "without_folders": without_folders, **filters}
    return environment.get_template(template.name).render(values).encode("utf-8", "backslashreplace")


def without_folders(text: str) -> str:
    """Return text with every absolute path reduced to its last part: whose machine it was is nobody's business.

    "cannot read '/home/me/scans/a.nii'" -> "cannot read 'a.nii'". Relative paths and URLs of object stores stay.
    """
    return _BARE_PATH.sub("", _QUOTED_PATH.sub(r"\1\2\1", text.replace("file://", "")))


def data_url(image: bytes, media_type: str) -> str:
    """Return an image as a URL that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(image).decode()}"
