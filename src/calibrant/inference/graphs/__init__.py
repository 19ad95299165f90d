"""Programs that are recorded as graphs, which run without Python."""
