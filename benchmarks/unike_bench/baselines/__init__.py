"""Other implementations of what is measured."""
