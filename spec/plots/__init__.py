"""Pictures of runs and of what the lessons teach: from numbers to matplotlib figures."""
