"""One file for each verb: its options, and how its result is printed."""
