"""The hooked forward pass: a model's own modules, with interventions as data."""
