"""A scan on disk -> a volume -> a store -> manifest rows."""
