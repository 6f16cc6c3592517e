"""Starting, probing and stopping TorchServe: what ``mambamic serve`` is made of."""
