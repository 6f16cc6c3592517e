"""Training: images held as uint8 on the device, augmented there, with Lightning for the loop."""
