"""What the stages of a study do: one function `work` each, which knows neither keys nor publishing."""
