"""Judgements: verdicts with stated error rates, a conclusion, and descriptions in words."""
