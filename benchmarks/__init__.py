"""One small script per claim in the README; each writes JSON."""
