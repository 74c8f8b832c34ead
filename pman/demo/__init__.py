"""`pman demo` (run.py) and the plugin that it runs (ctslice.py)."""
