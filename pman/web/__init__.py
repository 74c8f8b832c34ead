"""What pman answers over HTTP."""
