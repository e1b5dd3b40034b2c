"""What is known: tables folded from the log, and their queries."""
