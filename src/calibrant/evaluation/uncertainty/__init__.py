"""Experiments on the posteriors of images, of a model (exact or reference) beside its guide."""
