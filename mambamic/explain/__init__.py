"""Where in an image a prediction comes from: heat maps, and pictures of them."""
