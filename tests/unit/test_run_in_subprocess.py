"""Functions run in processes of their own: results, errors and peaks of memory come back."""

from __future__ import annotations

import os
import signal

import pytest

from fewstep.errors import ExportError, SourceError
from fewstep.run_in_subprocess import run_isolated

_MIB = 1 << 20


def double(number: int) -> int:
    return 2 * number


def hold(size_mib: int) -> int:
    return len(bytearray(b"x") * (size_mib * _MIB))


def refuse(what: str) -> None:
    raise SourceError(f"{what} is damaged", hint="download it again")


def end(status: int) -> None:
    os._exit(status)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_result_comes_back() -> None:
    assert run_isolated(double, {"number": 21}).result == 42


def test_peak_is_that_of_the_function() -> None:
    small, large = (run_isolated(hold, {"size_mib": size}).peak_bytes for size in (1, 201))
    assert 190 * _MIB < large - small < 210 * _MIB


def test_error_comes_back_with_its_hint() -> None:
    with pytest.raises(SourceError, match="weights is damaged\n\nhint: download it again"):
        run_isolated(refuse, {"what": "weights"})


def test_process_that_ends_without_a_result_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"test_run_in_subprocess.end ended with status 3 and no result"):
        run_isolated(end, {"status": 3})


def test_killed_process_is_an_error_that_asks_for_memory() -> None:
    with pytest.raises(ExportError, match=r"was killed by signal 9\n\nhint: was there enough memory"):
        run_isolated(kill, {})
