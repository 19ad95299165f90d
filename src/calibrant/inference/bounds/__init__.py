"""Evidence, by bridge sampling where it is not known exactly."""
