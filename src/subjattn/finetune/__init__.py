"""Fine-tuning arms: LoRA adapters trained on an arm's facts."""
