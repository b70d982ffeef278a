"""Layers that users copy from a repository: there is nothing to import, and they are known by their structure."""
