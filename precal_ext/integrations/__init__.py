"""Adapters for the servers people use. Nothing here is imported until its host is."""
