"""Whole paths: a real `pman serve`, spoken to as pfcon does, on a real cluster."""
