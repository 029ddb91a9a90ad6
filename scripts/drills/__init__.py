"""What `scripts/drill.py` does to a run, and how it sees whether anything was lost."""
