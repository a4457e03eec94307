"""MCP, the Metacircular Control Plane: containers on a small fleet of machines that one operator owns."""

__version__ = "0.1.0"
