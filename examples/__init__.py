"""Flows to copy and change."""
