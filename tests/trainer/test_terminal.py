"""The terminal: the listed noise of the libraries is hidden, and nothing else."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator

import pytest

from rekatrain.trainer.terminal import CHATTY, VERBOSE, set_up_terminal


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give back the filters, levels and variables that `set_up_terminal` changes."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    states = [(logger, logger.level, list(logger.filters)) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
        logger.filters.clear()
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", VERBOSE, "RANK"):
        monkeypatch.setenv(name, "")  # so that it is given back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    for logger, level, filters in states:
        logger.setLevel(level)
        logger.filters[:] = filters


def shown(category: type[Warning], message: str, module: str) -> bool:
    """Return True if a warning is shown that code of `module` gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit(message, category, "file.py", 1, module=module)
    return len(caught) == 1


RENAMED = "`gradient_checkpointing` is deprecated and will be removed in v6. Use `activation_checkpointing` instead."


def test_set_up_terminal_hides_the_listed_warnings_alone() -> None:
    assert shown(FutureWarning, RENAMED, "transformers.training_args")
    set_up_terminal()
    assert not shown(FutureWarning, RENAMED, "transformers.training_args")
    assert shown(FutureWarning, RENAMED, "my_rewards")
    assert shown(FutureWarning, "`other` is deprecated", "transformers.training_args")
    assert shown(UserWarning, RENAMED, "transformers.training_args")


def test_set_up_terminal_hides_the_listed_log_lines_alone() -> None:
    set_up_terminal()
    set_up_terminal()
    logger = logging.getLogger("DeepSpeed")
    assert len(logger.filters) == 1
    lines = {"Setting accelerator to CPU. If you have GPU": False, "Another warning": True}
    for line, is_kept in lines.items():
        record = logger.makeRecord("DeepSpeed", logging.WARNING, "file.py", 1, line, (), None)
        assert bool(logger.filter(record)) == is_kept


@pytest.mark.parametrize("how", ["variable", "warning options"])
def test_set_up_terminal_shows_all_on_request(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "variable":
        monkeypatch.setenv(VERBOSE, "1")
    else:
        monkeypatch.setattr(sys, "warnoptions", ["default"])
    set_up_terminal()
    assert shown(FutureWarning, RENAMED, "transformers.training_args")
    assert ("HF_DATASETS_DISABLE_PROGRESS_BARS" in os.environ) == (how != "variable")
