"""What client and server must agree on, and nothing more."""
