"""``mambamic benchmark``: what is measured, on what machine, and how far it is from the floors."""
