"""Remedies for a guide: tried on the data of a check, and measured."""
