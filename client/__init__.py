"""What runs next to the user's data: the device's history, its contribution, its private adapter."""
