"""Reference posteriors: exact solutions, Markov chains, and the convergence gate that judges them."""
