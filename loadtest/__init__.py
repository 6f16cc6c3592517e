"""Load for a server: Locust scenarios, the images that they send, what counts as an answer."""
