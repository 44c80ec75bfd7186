"""Options of the test run."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PARITY = Path(__file__).parent / "parity"

# A shell starts background jobs with Ctrl-C ignored, and nohup starts them with SIGHUP ignored. What tests start would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--long", action="store_true", help="run them all, those that take many minutes too")
    parser.addoption("--parity-dir", type=Path, default=PARITY, help="golden numbers to test the model against")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_long = config.getoption("--long")
    names = set() if is_long else {"long"} if config.getoption("--slow") else {"long", "slow"}
    left_out = [item for item in items if names & set(item.keywords)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Any:
    """The golden numbers of --parity-dir."""
    from golden import Golden  # late: tests of the data part do without torch

    return Golden(request.config.getoption("--parity-dir"))


@pytest.fixture(scope="session")
def there() -> Iterator[Callable[..., Any]]:
    """Call a function of a module in a process that may have `other_device`."""
    from other_device import elsewhere  # late, as above

    with elsewhere() as call:
        yield call


@pytest.fixture
def without_compiler() -> Iterator[None]:
    """No C++ compiler for torch, and nothing that it has compiled before; afterwards all is as it was."""
    import torch._dynamo  # late, too
    import torch._inductor.config

    torch._dynamo.reset()
    with torch._inductor.config.patch({"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)}):
        yield
    torch._dynamo.reset()
