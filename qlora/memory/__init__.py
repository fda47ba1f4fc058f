"""What a run will hold, and what fits."""
