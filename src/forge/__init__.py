"""forge: a durable, fair, event-sourced picture service in front of ComfyUI."""
