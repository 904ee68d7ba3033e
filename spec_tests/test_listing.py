"""Listings for notebooks: the source as it is, escaped, each column under its title."""

from __future__ import annotations

import html
import inspect
import re

import pytest

from spec import listing
from spec.batches import Counts, epoch_order


def test_each_column_holds_its_title_its_modules_and_their_source():
    shown = listing.side_by_side({"one": [epoch_order], "two <b>": [Counts, listing.side_by_side]})
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", shown, re.DOTALL)
    assert [html.unescape(title) for title in cells[:2]] == ["one", "two <b>"]
    listed = [
        [html.unescape(source) for source in re.findall(r"<pre>(.*?)</pre>", cell, re.DOTALL)] for cell in cells[2:]
    ]
    assert listed == [
        [inspect.getsource(epoch_order).rstrip()],
        [inspect.getsource(Counts).rstrip(), inspect.getsource(listing.side_by_side).rstrip()],
    ]
    assert re.findall(r"<b>(.*?)</b>", "".join(cells[2:])) == ["spec.batches", "spec.batches", "spec.listing"]


def test_a_method_is_set_flush_left():
    shown = listing.side_by_side({"one": [Counts.batch_sizes]})
    assert "<pre>def batch_sizes(self)" in shown


def test_what_has_no_source_is_refused():
    with pytest.raises(TypeError):
        listing.side_by_side({"one": [len]})
