"""`photon demo`: its steps run each once, one that fails says so, and all of them together end with a page."""

import subprocess
import sys

import pytest
import typer

pytest.importorskip("torch")
from photon_cli import demo
from photon_cli.demo import Demo, Step

FAILS = Step("verify", "checked what is not there", ("photon-data", "verify", "nowhere"))


class Few(Demo):
    """Two steps and one that fails, if it is to."""

    fails = False

    def _small_scans(self):
        yield Step("said", "said its version", ("photon-data", "--version"))
        if self.fails:
            yield FAILS

    def _model_and_scans(self):
        yield Step("helped", "said what there is", ("photon-data", "--help"))

    def _training(self):
        return iter(())

    _preparing = _scoring = _asking = _training


def test_steps_run_once_and_one_that_fails_ends_the_demo_with_its_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "write_page", lambda folder: folder / "index.html")
    Few(tmp_path).run()
    out = capsys.readouterr().out
    assert "said its version" in out and "said what there is" in out
    assert (tmp_path / "logs" / "said.txt").read_text().startswith("photon-data")
    assert "Usage" in (tmp_path / "logs" / "helped.txt").read_text()
    monkeypatch.setattr(Few, "fails", True)
    with pytest.raises((SystemExit, typer.Exit)):
        Few(tmp_path).run()
    said = capsys.readouterr()
    assert "said" not in said.out, "those are done"
    assert "photon-data verify nowhere: exit code 2" in said.err and "expected" in said.err


@pytest.mark.slow
def test_the_whole_product_runs_on_scans_that_it_makes_itself_and_a_second_call_makes_nothing_again(tmp_path):
    command = [sys.executable, "-c", "from photon_cli.photon import main; main()", "demo", str(tmp_path), "--quick"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    assert 12 <= len(first.stdout.splitlines()) <= 60 and len(second.stdout.splitlines()) == 1
    page = (tmp_path / "index.html").read_text("utf-8")
    assert all(f"<h2>{heading}" in page for heading in ("What was prepared", "How it trained", "What it answers"))
    assert page.count("data:image/png") == 5, "a scan, two runs, two questions"
    assert page.count("<svg") == 2 and "organ asked about erased" in page, "the trade-off, and whether it looks"
    assert not list((tmp_path / "logs").glob("next.*"))
