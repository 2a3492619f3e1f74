"""What a run survives, tried out: damaged files (fuzz), kills (faults), long runs (soak)."""
