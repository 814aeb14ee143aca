"""Ranks and the only collectives on features: world, gather, messages about lost ranks."""
