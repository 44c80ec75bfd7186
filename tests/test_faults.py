"""benchmarks/faults.py: what damages a prepared folder or a checkpoint is noticed, or changes nothing that is read."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "faults.py"


@pytest.mark.slow
def test_no_damaged_or_exchanged_file_is_read_in_silence_or_ends_in_a_traceback():
    command = [sys.executable, PROGRAM.name, "--trials", "40", "--what", "damage,swap", "--seed", "14"]
    ended = subprocess.run(command, cwd=PROGRAM.parent, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    what, tried, *_, silent, traceback = ended.stdout.splitlines()[-1].split()
    assert (what, silent, traceback) == ("all", "0", "0")
    assert int(tried) >= 60
