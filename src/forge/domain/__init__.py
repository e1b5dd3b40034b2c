"""The rules: pure functions on frozen structs, no I/O, no clock, no randomness."""
