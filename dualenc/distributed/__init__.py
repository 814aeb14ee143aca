"""Ranks and the only collectives on features: world, gather, what to say when a rank is lost."""
