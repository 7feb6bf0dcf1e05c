"""What only one model family knows, as data where it can be: roles in a pipeline, causal convolutions, norms."""
