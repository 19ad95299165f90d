"""The parts of every run folder: files that are written safely, digests, weights, configuration, NetCDF."""
