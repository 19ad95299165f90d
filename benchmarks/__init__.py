"""Scripts that measure: `python -m benchmarks.NAME`. They print ratios measured side by side, and assert nothing."""
