"""The paragraph of a user's mistake."""

from __future__ import annotations

import pickle

import pytest

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
