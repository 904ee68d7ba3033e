"""The kill matrix: one fault at a time planted into a copy of the implementations; the suite must turn red on each."""
