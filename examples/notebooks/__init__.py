"""Notebooks that run on a CPU in seconds: `wrap_and_watch`, `paper_in_ten_minutes`."""
