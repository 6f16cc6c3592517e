"""TorchServe handler: a thin shell over ``mambamic.Classifier``."""
