"""Remedies, tried and measured."""
