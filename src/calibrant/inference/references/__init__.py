"""Reference posteriors: exact solutions, Markov chains, and the gate that they pass."""
