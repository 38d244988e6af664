"""Side-by-side measurements; each prints ratios against a peer from the same run."""
