"""What measurements come to: verdicts with stated error rates, and sentences."""
