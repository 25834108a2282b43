"""The ServerApp side: a strategy that survives its server."""
