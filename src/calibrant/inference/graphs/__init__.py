"""Programs recorded as graphs, which run without Python."""
