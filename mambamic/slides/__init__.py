"""Whole slides: from files of gigapixels to tables, maps and pages of what a model says of them."""
