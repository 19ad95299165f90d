"""What embeddings and their uncertainties are worth: retrieval, rejection, crops, people, applications."""
