"""How many times the term arrives on large engines, run for real on CPUs: `python -m studies.engines`."""
