"""Encoders: from observations and covariates to features."""
