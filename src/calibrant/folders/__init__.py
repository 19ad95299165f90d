"""What every run folder is made of: safe files, digests, weights, configuration."""
