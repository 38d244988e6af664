"""What runs next to the user's data: history, contribution and private adapter of one device."""
