"""What is measured: arrays and trees in, xarray out."""
