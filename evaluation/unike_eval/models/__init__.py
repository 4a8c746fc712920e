"""Models that packages ship."""
