"""How good a checkpoint is on a split: metrics with intervals, plots, a page, a temperature."""
