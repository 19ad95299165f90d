"""Families of distributions by support, and the heads that compute them."""
