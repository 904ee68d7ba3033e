"""The torch side: as short as it can be."""
