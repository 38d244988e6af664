"""The adversaries of docs/THREATS.md, as code."""
