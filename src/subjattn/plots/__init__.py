"""Figures of measures, and the report that a person reads."""
