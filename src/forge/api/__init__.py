"""Who asks: the REST API, live events over WebSocket, problem details."""
