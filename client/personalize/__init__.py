"""What a device does with its own history: one module a technique."""
