"""The conditions of every test: a time limit that names the test, and no accelerator for JAX.

A test with the marker `matrix` runs a part of its cases by default, one with `cuda` only where
there is a CUDA device. Figures that tests measure (`figure`) are printed at the end of the run.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Generator

import full
import hypothesis
import pytest

# A shell that starts the tests in the background has Ctrl-C ignored; tests raise it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A hang in C (a lock, a barrier, TensorStore) is out of reach of a signal handler or of a thread.
# faulthandler's watchdog needs no interpreter: it prints every thread's traceback, and exits.
DEFAULT_TIMEOUT_SECONDS = 300.0

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# pytest reads every conftest.py as it is; collected for doctests too, those of two folders clash.
collect_ignore_glob = ["**/conftest.py"]

# The machine's speed is not a property under test, and a failure must be repeatable from CI's log.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")

_stderr_fd: int | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _stderr_fd
    # Capturing replaces descriptor 2 while a test runs, and would swallow the tracebacks.
    if _stderr_fd is None:
        _stderr_fd = os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0]) if marker else DEFAULT_TIMEOUT_SECONDS
    assert _stderr_fd is not None
    faulthandler.dump_traceback_later(seconds, exit=True, file=_stderr_fd)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("keyword") or any("::" in each for each in config.args):
        return  # asked for by name
    matrices: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("matrix"):
            matrices.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = set[pytest.Item]()
    for cases in matrices.values():
        marker = cases[0].get_closest_marker("matrix")
        assert marker is not None
        chosen = full.drawn(cases, marker.args[0], lambda item: item.nodeid.partition("[")[2])
        left_out |= set(cases) - set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Returns a function that prints a measured figure in the summary."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports: list[pytest.TestReport] = terminalreporter.getreports("passed")
    figures = [
        (report.nodeid.rpartition("/")[2], value)
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == "figure"
    ]
    if figures:
        terminalreporter.section("figures")
    for name, value in figures:
        terminalreporter.write_line(f"{name}: {value}")
