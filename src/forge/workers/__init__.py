"""What runs: the roles of a worker process."""
