"""Load on a server: many light devices beside real ones, and what that costs it."""
