"""README.md and docs/: the commands that stand there can be followed, and the files that they name exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from photon_cli import data, photon

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
APPS = {"photon-data": data.app, "photon": photon.app}
INLINE = re.compile(r"`(photon(?:-data)? [^`]+)`")
BLOCK = re.compile(r"^ *```[a-z]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def _commands(page):
    """Yield the words of each command of photon-data and photon in the page's blocks and sentences."""
    text = page.read_text("utf-8")
    for block in [*BLOCK.findall(text), *(found.replace("\n", " ") for found in INLINE.findall(text))]:
        for line in block.replace("\\\n", " ").split("\n"):
            line = line.replace("[", "").replace("]", "")
            words = shlex.split(line.strip().strip("$> "), comments=True) if "photon" in line.split("#")[0] else []
            if words and words[0] in APPS:
                yield words


def _problem(words):
    """What the command says of its words, None where it would run; it does not."""
    command = typer.main.get_command(APPS[words[0]])
    _disarm(command)
    try:
        command.main(words[1:], standalone_mode=False)
    except SystemExit:
        return None  # --help
    except Exception as error:  # typer has its own copies of click's errors
        said = error.format_message()  # a sentence about an option leaves the rest, or its value, out
        is_part = type(error).__name__ == "MissingParameter" or "requires an argument" in said
        return None if is_part else f"{' '.join(words)}: {said}"


def _disarm(command):
    command.callback = None
    for one in getattr(command, "commands", {}).values():
        _disarm(one)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_have_options_that_exist(page):
    assert [problem for words in _commands(page) if (problem := _problem(words))] == []


def test_commands_are_found_and_wrong_ones_are_told():
    assert sum(len(list(_commands(page))) for page in PAGES) > 40
    assert "extra argument" in _problem(["photon-data", "export", "out", "nifti", "--format", "nifti"])
    assert "--too" in _problem(["photon-data", "export", "out", "--too", "nifti"])
    assert "sevre" in _problem(["photon", "sevre"])


def test_links_of_a_page_lead_to_files():
    for page in PAGES:
        missing = [link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]
        assert not missing, (page.name, missing)
