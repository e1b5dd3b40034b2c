"""What can happen: every event forge writes, and how it is put on the wire."""
