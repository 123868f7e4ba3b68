"""Scripts that measure what tokenprune promises: ratios, taken in pairs, side by side in one run."""
