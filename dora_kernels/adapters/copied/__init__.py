"""Layers without a library to import: copied from repositories, known by their structure."""
