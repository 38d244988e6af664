"""Attacks on our own releases that give a number: what they can show must not exceed the claim."""
