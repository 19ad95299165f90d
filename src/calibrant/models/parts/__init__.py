"""Parts that models share: likelihoods, priors, decoders."""
