"""Many runs: sweeps, comparisons, and models that are frozen."""
