"""How a run is trained, kept and found again: the same for every question."""
