"""What the operator runs: the round loop and the only way from contributions to a release."""
