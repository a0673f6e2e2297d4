"""Ways to show results: TensorBoard and the console. They take results, never a guard."""
