"""Many trained adapters together."""
