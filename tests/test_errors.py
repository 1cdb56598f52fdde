"""The paragraph of a user's mistake."""

from __future__ import annotations

import logging.config
import pickle

import pytest

from compress.cli.errors import guarded
from compress.errors import CompressError


@pytest.mark.parametrize(
    ("expected", "received", "text"),
    [
        ("a number", "much", "here: expected a number; received much. Mend it."),
        ("one of a, b.", "c", "here: expected one of a, b; received c. Mend it."),
        ("a model", "an error (at x).", "here: expected a model; received an error (at x). Mend it."),
        ("one of a, ...", "c", "here: expected one of a, ...; received c. Mend it."),
    ],
)
def test_sentences_end_once(expected, received, text):
    error = CompressError("here", expected=expected, received=received, fix="Mend it.")
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text


def test_a_log_that_cannot_be_written_is_told_and_other_failures_keep_their_traceback(tmp_path, capsys):
    def log_into_nothing() -> list[CompressError]:
        handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "nowhere" / "run.log")}
        logging.config.dictConfig({"version": 1, "handlers": {"file": handler}, "root": {"handlers": ["file"]}})
        return []

    def fail() -> list[CompressError]:
        raise RuntimeError("a defect") from OSError("its cause")

    assert guarded(log_into_nothing, []) == 2
    assert "run.log" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a defect"):
        guarded(fail, [])
