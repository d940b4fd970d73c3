"""Many runs: the papers' tables and fair comparisons, carried out and timed first."""
