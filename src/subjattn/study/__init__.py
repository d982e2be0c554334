"""Studies: one YAML file, run in stages that survive being killed."""
