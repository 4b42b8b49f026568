"""A lossless receiver whose messages become files; what the service starts of it, and watches."""
