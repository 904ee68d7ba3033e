"""Pictures: matplotlib figures of runs and of the lessons' facts."""
