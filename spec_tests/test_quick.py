"""Quick mode: what the notebooks take is what they say."""

from __future__ import annotations

import pytest

from spec import quick
from spec.errors import UserError


@pytest.mark.parametrize(
    ("value", "expected", "mode"), [("1", "few", "quick mode"), ("0", "all", "full mode"), ("", "all", "full mode")]
)
def test_what_is_taken_is_what_is_said(value, expected, mode, monkeypatch):
    monkeypatch.setenv(quick.VARIABLE, value)
    assert quick.sized(full="all", quick="few") == expected
    assert quick.said().startswith(mode)


@pytest.mark.parametrize("value", ["maybe", "true", "2"])
def test_what_is_no_switch_is_refused(value, monkeypatch):
    monkeypatch.setenv(quick.VARIABLE, value)
    with pytest.raises(
        UserError, match=rf"LOCKSTEP_QUICK is '{value}'; set it to 1 for quick mode, or to 0 or nothing"
    ):
        quick.sized(full="all", quick="few")


def test_without_the_variable_all_is_taken(monkeypatch):
    monkeypatch.delenv(quick.VARIABLE, raising=False)
    assert quick.sized(full="all", quick="few") == "all"
    assert quick.said().startswith("full mode")
