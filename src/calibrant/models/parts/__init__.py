"""Parts that any model takes: likelihoods, priors, decoders."""
