"""The control socket, and what the service does when a client asks for it there."""
