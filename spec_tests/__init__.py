"""Tests and measurements over both implementations; nothing imports them."""
