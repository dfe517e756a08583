"""One runner: ``python -m bench``. Ops and whole training steps, beside their peers."""
