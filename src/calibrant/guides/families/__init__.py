"""Families of variational distributions, and the heads that compute their parameters."""
