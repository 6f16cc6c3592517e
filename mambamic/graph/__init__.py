"""The inference graph: a trained model rewritten for speed, one file per device."""
