"""Data sets as users arrange them: opened, checked and summed up, without torch."""
