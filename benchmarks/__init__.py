"""The ceilings and the peers, side by side in one run, and the check of what only a GPU can show."""
