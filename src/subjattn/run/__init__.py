"""Running a plan of stages into a folder; knows no facts, no models and no measures."""
