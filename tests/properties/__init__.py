"""Properties that hold for any input, searched for counter-examples by hypothesis."""
