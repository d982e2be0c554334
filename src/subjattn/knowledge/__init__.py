"""What a model knows before it is tuned: SliCK labels, other definitions, and how far they agree."""
